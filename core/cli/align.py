"""``stitchvm align``: sample prompts with a method that seeks a high reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .options import BackboneName, EmbeddedGuidance, Weights, key_values, refuse_given, weighted
from .output import Json, print_json, print_table
from .training import train_and_print

if TYPE_CHECKING:
    from ..alignment.result import AlignResult


def command(
    context: typer.Context,
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A method of 'stitchvm list': sample, fk-steering ..")
    ],
    backbone: BackboneName,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="SRC",
            help="A text file, one prompt a line, or a dataset: held-out prompts, training ones to train.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where pictures and align.json go; a rerun continues there.")
    ],
    value: Annotated[str | None, typer.Option(metavar="DIR", help="The value model that steers.")] = None,
    estimator: Annotated[
        str | None, typer.Option(help="Instead of a value model: tweedie or monte-carlo, with --reward.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Picks the best sample; the sum of several (default: the value's own)."),
    ] = None,
    weights: Weights = None,
    lora: Annotated[
        str | None, typer.Option(metavar="DIR", help="A LoRA to sample with, such as a method that trains wrote.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many prompts (default: the whole file; a dataset needs it).")
    ] = None,
    particles: Annotated[int | None, typer.Option(help="Samples a prompt (default: the method's).")] = None,
    proposals: Annotated[
        int | None, typer.Option(help="Draws a particle and step, where the method takes some (default: its own).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all noise; runs of one seed can be compared in pairs.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: 28, in training 10).")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is none (default: 3; 1 if distilled and in training)."),
    ] = None,
    embedded_guidance: EmbeddedGuidance = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What classifier-free guidance leads away from.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels (default: the backbone's own).")] = None,
    batch: Annotated[int, typer.Option(help="Samples in memory at a time; changes nothing else.")] = 64,
    reuse: Annotated[bool, typer.Option(help="Let denoising steps finish the value model's passes.")] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; may be repeated.")
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="KEY=VALUE", help="Of a method that trains: updates=100, learning_rate .."),
    ] = None,
    held_out_reward: Annotated[
        list[str] | None, typer.Option(help="Of a method that trains: a reward to watch; may be repeated.")
    ] = None,
    evaluation_prompts: Annotated[
        int,
        typer.Option(min=2, help="Of a method that trains: prompts to watch, a dataset's held-out ones."),
    ] = 16,
    as_json: Json = False,
) -> None:
    """Sample prompts with a method that seeks a high reward, steered by a value model or another estimator; or, with a
    method that trains, finetune the backbone for it.

    Training with several processes: accelerate launch -m stitchvm.core.cli align ...
    """
    from ..alignment.run import align
    from ..prompts import open_prompts
    from ..registries import registry

    if value is not None and estimator is not None:
        raise ConfigError("--value and --estimator each say what steers; give one of them.")
    steered_by, own = value if estimator is None else estimator, method_settings(context, settings or ())
    judge = weighted(reward, weights)
    if registry().aligner(method).trains:
        surplus = ("particles", "proposals", "batch", "reuse", "lora", "negative_prompt")
        refuse_given(context, surplus, f"{method} trains; see --set, and --train batch=N.")
        chosen = {"steps": steps, "guidance_scale": guidance_scale}
        train_and_print(
            method, backbone, steered_by, prompts, count, out, as_json, training or (), seed=seed, reward=judge,
            embedded_guidance=embedded_guidance, resolution=resolution,
            held_out_rewards=tuple(held_out_reward or ()), watched=evaluation_prompts, **own,
            **{name: entry for name, entry in chosen.items() if entry is not None},
        )  # fmt: skip
        return
    of_training = ("training", "held_out_reward", "evaluation_prompts")
    refuse_given(context, of_training, f"{method} samples and trains nothing.")
    result = align(
        method, backbone, steered_by, open_prompts(prompts, count, split="test"), particles=particles,
        proposals=proposals, seed=seed, steps=28 if steps is None else steps, guidance_scale=guidance_scale,
        embedded_guidance=embedded_guidance, negative_prompt=negative_prompt, resolution=resolution, reward=judge,
        lora=lora, batch=batch, reuse=reuse, out=out, **own,
    )  # fmt: skip
    if as_json:
        print_json(result.report())
    else:
        _print(result, out)


def method_settings(context: typer.Context, pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs of ``--set`` as settings; :class:`ConfigError` for what is an option of the command."""
    found = key_values(pairs, "--set", "strength=20")
    options = {option.name: option.opts[0] for option in context.command.params}
    for key in found:
        if key in options:
            raise ConfigError(f"--set {key}: that is an option of its own, {options[key]}.")
    return found


def _print(result: AlignResult, out: Path) -> None:
    from ..comparison import mean_stderr

    facts = {
        "prompts": len(result.prompts), "particles": result.settings["particles"],
        f"mean {result.settings['reward']['name']}": mean_stderr(result.rewards), **result.cost,
    }  # fmt: skip
    rows = [(name.replace("_", " "), str(fact)) for name, fact in facts.items()]
    print_table((result.settings["method"], str(out)), rows)
