"""``stitchvm diagnose``: which value estimator to steer by, where and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .options import BackboneName, EmbeddedGuidance, Weights, levels, names, weighted
from .output import Json, print_json, print_table

if TYPE_CHECKING:
    import torch

    from ..backbone import Backbone
    from ..estimators import Estimator
    from ..joint import AnyReward, GivenReward
    from ..kernels import Kernel
    from ..value import StitchedValue

ESTIMATORS = "tweedie,mc-1,mc-4,mc-16"
BOTH = ("ode", "sde")


def command(
    backbone: BackboneName,
    prompts: Annotated[
        str, typer.Option(metavar="SRC", help="A text file, one prompt a line, or a dataset (held out).")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For diagnosis.json and pictures; a rerun continues there.")],
    value: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A value model to measure; may be repeated.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="What is estimated; the sum of several (default: the value model's own)."),
    ] = None,
    weights: Weights = None,
    lora: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A LoRA to draw the samples with; values keep their own heads.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many prompts (default: the whole file; a dataset needs it).")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Samples a prompt.")] = 12,
    kernel: Annotated[str, typer.Option(help="How samples are drawn: ode, sde, both, ancestral or cps.")] = "both",
    estimators: Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"Of stitched, tweedie and mc-N (default: stitched,{ESTIMATORS})."),
    ] = None,
    sigmas: Annotated[str, typer.Option(metavar="LIST", help="Noise levels.")] = "0.9,0.75,0.5,0.25,0.1",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 28,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none (default: 3, or 1 if distilled).")
    ] = None,
    embedded_guidance: EmbeddedGuidance = None,
    gradients: Annotated[bool, typer.Option(help="Compare gradients with those of many rollouts.")] = True,
    gradient_rollouts: Annotated[int, typer.Option(help="Rollouts of the gradient that is compared with.")] = 64,
    gradient_prompts: Annotated[int, typer.Option(help="Prompts to compare gradients on.")] = 4,
    gradient_seeds: Annotated[int, typer.Option(help="Seeds a prompt to compare gradients on.")] = 2,
    rollout_steps: Annotated[int, typer.Option(help="Steps of a Monte Carlo rollout.")] = 8,
    rollout_kernel: Annotated[str, typer.Option(help="Kernel of Monte Carlo rollouts.")] = "ancestral",
    resolution: Annotated[int | None, typer.Option(help="Pixels (default: the backbone's own).")] = None,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples in memory at a time; changes nothing else.")] = 64,
    as_json: Json = False,
) -> None:
    """Measure value estimators along the backbone's own samples: ranking, calibration, gradient, cost by noise level.

    Prompts of a dataset with a detector: also how well each estimator foresees what it will say. With the same
    settings a kernel that is done is not repeated, and an interrupted one goes on where it stopped.
    """
    from ..diagnosis.report import run_diagnosis
    from ..kernels import KERNELS
    from ..loading import load_backbone
    from ..lora import with_lora
    from ..prompts import judges_of_prompts, open_prompts

    if kernel != "both" and kernel not in KERNELS:
        raise ConfigError(f"--kernel is {kernel!r}; choose one of both, {', '.join(KERNELS)}.")
    if rollout_kernel == "ode" or rollout_kernel not in KERNELS:
        noisy = ", ".join(name for name in KERNELS if name != "ode")
        raise ConfigError(f"--rollout-kernel is {rollout_kernel!r}; choose one with noise: {noisy}.")
    wanted, drawn = _wanted(estimators, value or []), KERNELS[rollout_kernel]()
    network = load_backbone(backbone)
    sampled = network if lora is None else with_lora(network, lora)
    models = _values(value or [], network)
    judge = _judge(weighted(reward, weights), models, network.device)
    report = run_diagnosis(
        sampled, _estimators(wanted, models, judge, rollout_steps, drawn, seed), judge,
        open_prompts(prompts, count, split="test"), out, rollout_kernel=drawn, batch=batch,
        judges=judges_of_prompts(prompts), seeds=seeds, steps=steps,
        kernels={name: KERNELS[name]() for name in (BOTH if kernel == "both" else (kernel,))},
        guidance_scale=guidance_scale, embedded_guidance=embedded_guidance, sigmas=levels(sigmas, "--sigmas"),
        gradients=gradients, gradient_rollouts=gradient_rollouts, gradient_prompts=gradient_prompts,
        gradient_seeds=gradient_seeds, rollout_steps=rollout_steps, resolution=resolution, seed=seed,
    )  # fmt: skip
    if as_json:
        print_json(report)
    else:
        _print(report, out)


def _wanted(text: str | None, folders: Sequence[Path]) -> tuple[str, ...]:
    """The estimators to measure, checked."""
    found = names(text or (f"stitched,{ESTIMATORS}" if folders else ESTIMATORS), "--estimators")
    for name in found:
        kind, _, rollouts = name.partition("-")
        if name not in ("stitched", "tweedie") and not (kind == "mc" and rollouts.isdigit() and int(rollouts) > 0):
            raise ConfigError(f"--estimators: {name!r} is none; write stitched, tweedie or mc-N, such as mc-4.")
    if ("stitched" in found) != bool(folders):
        raise ConfigError(
            "--estimators has no stitched, so --value measures nothing; leave it out, or add stitched."
            if folders else "--estimators has stitched; name the value model's folder by --value."
        )  # fmt: skip
    return found


def _values(folders: Sequence[Path], backbone: Backbone) -> dict[str, StitchedValue]:
    """The value models as ``stitched``, or as ``stitched NAME`` by their folders where there are several."""
    from ..value import StitchedValue

    places = {"stitched" if len(folders) == 1 else f"stitched {folder.resolve().name}": folder for folder in folders}
    if len(places) < len(folders):
        raise ConfigError("--value: two folders have the same name; rename one, so that they can be told apart.")
    return {
        name: StitchedValue.from_pretrained(place, steers=backbone, device=backbone.device)
        for name, place in places.items()
    }


def _judge(reward: GivenReward | None, models: Mapping[str, StitchedValue], device: torch.device) -> AnyReward:
    """The reward that all values estimate, by default the values' own."""
    from ..joint import load_judge
    from ..records import name_of

    if reward is None and not models:
        raise ConfigError("nothing says what to estimate; give --reward, or a value model by --value.")
    objectives = {name: model.objective() for name, model in models.items()}
    judge = next(iter(objectives.values())) if reward is None else load_judge(reward, device)
    for name, objective in objectives.items():
        if name_of(objective) != name_of(judge):
            raise ConfigError(
                f"{name} estimates {name_of(objective)}, not {name_of(judge)}; estimators of different rewards cannot "
                "be compared. Diagnose it on its own."
            )
    return judge


def _estimators(
    wanted: Sequence[str], models: Mapping[str, StitchedValue], reward: AnyReward, steps: int, kernel: Kernel, seed: int
) -> dict[str, Estimator]:
    from ..estimators import Stitched, Tweedie
    from ..monte_carlo import MonteCarlo

    found: dict[str, Estimator] = {}
    for name in wanted:
        if name == "stitched":
            found |= {model: Stitched(value) for model, value in models.items()}
        elif name == "tweedie":
            found[name] = Tweedie(reward)
        else:
            rollouts = int(name.removeprefix("mc-"))
            found[name] = MonteCarlo(reward, rollouts=rollouts, steps=steps, kernel=kernel, seed=seed)
    return found


TABLES = {
    "rank": "rank in a prompt",
    "within_slope": "slope in a prompt",
    "bias": "bias",
    "cosine": "gradient cosine",
}


def _print(report: Mapping[str, Any], out: Path) -> None:
    for kernel, part in report["kernels"].items():
        typer.echo(f"{kernel} samples of {part['prompts']} prompts, {part['seeds']} seeds each\n")
        columns = [f"sigma {sigma:.2f}" for sigma in part["sigma"]]
        for figure, label in TABLES.items():
            rows = [
                (name, *map(_shown, found[figure], found[f"{figure}_stderr"]))
                for name, found in part["estimators"].items()
                if figure in found
            ]
            if rows:
                print_table((label, *columns), rows)
                typer.echo()
        _print_shares(part["estimators"], columns)
        for judge, found in part["judges"].items():
            _print_judgement(judge, found, columns)
        rows = [(name, *_times(found["cost"])) for name, found in part["estimators"].items()]
        print_table(("milliseconds a latent", "value", "gradient"), rows)
        typer.echo()
    typer.echo(
        f"Written to {out}: diagnosis.json" + "".join(f", diagnosis-{kernel}.png" for kernel in report["kernels"])
    )


def _print_shares(estimators: Mapping[str, Any], columns: Sequence[str]) -> None:
    """The ranks as shares of Tweedie's, where that was measured (and not by an earlier version, which had none)."""
    rows = [(name, *map(_shown, found["beside"]["tweedie"]["share"], found["beside"]["tweedie"]["share_stderr"]))
            for name, found in estimators.items() if "tweedie" in found.get("beside", {})]  # fmt: skip
    if rows:
        print_table(("rank, as a share of tweedie's", *columns), rows)
        typer.echo()


def _print_judgement(judge: str, found: Mapping[str, Any], columns: Sequence[str]) -> None:
    if found["ranks"] is None:
        typer.echo(f"The {judge} says the same of all seeds of every prompt.\n")
        return
    rows = [
        (name, *(_shown(level["mean"], level["stderr"]) for level in levels)) for name, levels in found["ranks"].items()
    ]
    print_table((f"rank in a prompt, of the {judge}", *columns), rows)
    typer.echo(f"Of the final reward itself: {_shown(found['rank']['mean'], found['rank']['stderr'])}\n")


def _shown(number: float | None, error: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:.3f}" if error is None else f"{number:.3f} ± {error:.3f}"


def _times(cost: Mapping[str, Any]) -> list[str]:
    return [f"{1000 * cost[kind]['seconds']:.3g}" if kind in cost else "–" for kind in ("forward", "gradient")]
