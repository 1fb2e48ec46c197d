"""``stitchvm stitch``: search, join and finetune a pair."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .options import (
    BackboneName,
    Blocks,
    Cuts,
    EmbeddedGuidance,
    Images,
    RewardNames,
    Taps,
    names,
    numbers,
    reals,
    refuse_given,
    warn_skipped,
)
from .output import Json, print_json, print_table

if TYPE_CHECKING:
    from ..stitching.finetune_settings import FinetuneSettings
    from ..value import StitchedValue

_SAME = "(default: the recipe's)"
_OF_SAMPLES = ("samples", "sampling_steps", "guidance_scale", "prompts")


def command(
    context: typer.Context,
    backbone: BackboneName,
    reward: RewardNames,
    images: Images,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the value model goes; a rerun continues there.")],
    weights: Annotated[
        str | None, typer.Option(metavar="LIST", help="Of the rewards in the value, such as 1,0.5 (default: 1 each).")
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="paper, quick, full, further, or TOML that may change a base.")
    ] = "paper",
    steps: Annotated[int | None, typer.Option(help=f"Finetune steps {_SAME}.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Latents a step {_SAME}.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=f"Of the tail {_SAME}.")] = None,
    generated: Annotated[
        float | None, typer.Option(help=f"Share of each batch from the backbone's own samples, 0 to 1 {_SAME}.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Of all randomness but the choice of a dataset's pictures and prompts {_SAME}.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Real images to train on (default: all; 8192 if made).")] = None,
    samples: Annotated[int, typer.Option(help="Samples of the backbone's own, where the recipe takes some.")] = 4096,
    sampling_steps: Annotated[int, typer.Option(help="Steps those samples take.")] = 28,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance of the sampler to be read (default: 3, or 1 if distilled)."),
    ] = None,
    embedded_guidance: EmbeddedGuidance = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="What they are drawn for: a dataset or a text file (default: no prompt)."),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A LoRA that takes turns with the backbone in drawing them; may be repeated."),
    ] = None,
    conditioning: Annotated[
        str | None, typer.Option(metavar="null|prompt", help=f"What the head reads of samples {_SAME}.")
    ] = None,
    interface: Annotated[
        str | None, typer.Option(metavar="I,J", help="Cut here, without a search; one J for each reward.")
    ] = None,
    vae: Annotated[bool, typer.Option("--vae", help="VAE stitching, the baseline: cut at the latent itself.")] = False,
    cuts: Cuts = None,
    blocks: Blocks = "1-4",
    taps: Taps = None,
    start_from: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Finetune this value model of the pair further, without a search."),
    ] = None,
    transfer_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Begin as this value of another backbone with the same latents, without a search."
        ),
    ] = None,
    probes: Annotated[int | None, typer.Option(help="Images to judge every pair of cuts on (default: 200).")] = None,
    criterion: Annotated[str | None, typer.Option(help="functional (the default), unexplained or mse.")] = None,
    as_json: Json = False,
) -> None:
    """Make a value model: search the best cuts, join the halves, finetune, save.

    Several rewards share one head; the value is their weighted sum.
    """
    from ..images import open_images
    from ..prompts import open_prompts
    from ..stitching.examples import GenerationSettings
    from ..stitching.run import stitch

    given = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "generated": generated, "seed": seed
    }  # fmt: skip
    settings = read_recipe(recipe, _given(given))
    if settings.generated == 0:
        refuse_given(context, _OF_SAMPLES, f"the recipe {recipe} takes no samples; set --generated above 0.")
    if interface is not None or vae or start_from is not None or transfer_from is not None:
        refuse_given(context, ("blocks",), "where to cut is given already.")
    if vae:
        refuse_given(context, ("taps",), "at the latent itself there are no earlier cuts.")
    source = open_images(images, count)
    asked = None if prompts is None else open_prompts(prompts, max(samples // settings.seeds_per_prompt, 1))
    searching = {
        "taps": None if taps is None else numbers(taps, "--taps"), "probes": probes, "criterion": criterion
    }  # fmt: skip
    value = stitch(
        backbone, names(reward, "REWARD"), images=source, out=out, prompts=asked, recipe=settings, count=count,
        weights=None if weights is None else reals(weights, "--weights"), samples=samples,
        generation=GenerationSettings(sampling_steps, guidance_scale, settings.seed), seed=settings.seed,
        embedded_guidance=embedded_guidance, conditioning=conditioning, start_from=start_from,
        transfer_from=transfer_from, loras=tuple(lora or ()),
        **_where(interface, vae, cuts, blocks, start_from, transfer_from), **_given(searching),
    )  # fmt: skip
    warn_skipped(source)
    report = _report(value, out)
    if as_json:
        print_json(report)
    else:
        _print(report)


def read_recipe(source: str, changes: dict[str, Any]) -> FinetuneSettings:
    """A recipe by name, or from a TOML file whose ``base`` names the one that it changes (the paper's where it has
    none), with ``changes``; :class:`ConfigError` names what is wrong in it."""
    from ..stitching.finetune_settings import FinetuneSettings
    from ..stitching.recipes import recipe
    from ..structuring import plain, structure

    path = Path(source).expanduser()
    if path.suffix != ".toml":
        return structure(FinetuneSettings, {**plain(recipe(source)), **changes}, "recipe")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {source!r} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"recipe {source!r} is not valid TOML: {error}.") from error
    base = plain(recipe(table.pop("base", "paper")))
    return structure(FinetuneSettings, {**base, **table, **changes}, source)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: option for name, option in options.items() if option is not None}


def _where(
    interface: str | None, vae: bool, cuts: str | None, blocks: str, start_from: Path | None, transfer_from: Path | None
) -> dict[str, Any]:
    """The settings that say where to cut; none where an earlier value model does."""
    from ..stitching.run import VAE_STITCHING

    if sum((interface is not None, vae, cuts is not None, start_from is not None)) > 1:
        raise ConfigError("--interface, --vae, --cuts and --start-from each say where to cut; give one of them.")
    if transfer_from is not None and (interface is not None or vae):
        raise ConfigError("--transfer-from says before which block of the reward; give --cuts for the backbone's.")
    if start_from is not None:
        return {}
    if interface is not None:
        if not re.fullmatch(r"\d+(,\d+)+", interface):
            raise ConfigError(f"--interface is {interface!r}; write backbone cut and reward block, such as 4,1.")
        return {"interface": tuple(int(part) for part in interface.split(","))}
    if vae:
        return VAE_STITCHING
    chosen = {"cuts": None if cuts is None else numbers(cuts, "--cuts")}
    return chosen if transfer_from is not None else {**chosen, "blocks": numbers(blocks, "--blocks")}


def _report(value: StitchedValue, out: Path) -> dict[str, Any]:
    blocks, made = {name: value.interface(name).j for name in value.names}, value.provenance
    entered = value.interface().j if len(blocks) == 1 else blocks
    return {
        "out": str(out), "interface": {"i": value.head.cut, "j": entered}, "taps": list(value.head.taps),
        "recipe": made.recipe, "weights": dict(zip(value.names, value.weights, strict=True)), "metrics": made.metrics,
        "cost": made.cost, "seed": made.seed,
    }  # fmt: skip


def _print(report: dict[str, Any]) -> None:
    from ..plots import place

    i, j = report["interface"]["i"], report["interface"]["j"]
    blocks = ", ".join(f"{block} of {name}" for name, block in j.items()) if isinstance(j, dict) else j
    facts = {"cut": f"{place(i)}, before reward block {blocks}", **report["metrics"], **report["cost"]}
    rows = [(str(key).replace("_", " "), str(fact)) for key, fact in facts.items()]
    print_table(("value model", report["out"]), rows)
