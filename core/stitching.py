"""``stitch``: search, join and finetune a pair, from names or objects to a saved value model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from . import plots
from .artefact import Provenance
from .backbone import Backbone
from .costs import CostMeter
from .criteria import Criterion
from .errors import ConfigError
from .examples import Examples, GenerationSettings, build_examples, cache_key, from_images, from_samples
from .files import make_folder
from .finetune import FinetuneSettings, finetune
from .images import ImageSource, open_images
from .loading import load_backbone, load_reward, name_of
from .provenance import model_identity
from .reward import Reward
from .searching import SearchResult, search
from .slicing import Head
from .value import Interface, StitchedValue


@attrs.frozen(kw_only=True)
class StitchSettings:
    """What :func:`stitch` does beside the recipe.

    ``interface`` skips the choice (the map is still fitted); ``cuts`` and ``blocks`` bound the search; ``count`` real
    images and ``samples`` generated ones feed stage 2; ``resolution`` in image pixels (default the backbone's own).
    """

    interface: tuple[int, int] | None = None
    cuts: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    probes: int = attrs.field(default=200, validator=attrs.validators.gt(0))
    criterion: Criterion = "functional"
    positions: bool = False
    count: int | None = None
    samples: int = attrs.field(default=4096, validator=attrs.validators.gt(0))
    generation: GenerationSettings = attrs.field(factory=GenerationSettings)
    resolution: int | None = None
    batch: int = attrs.field(default=32, validator=attrs.validators.gt(0))
    seed: int = 0


def stitch(
    backbone: str | Backbone,
    reward: str | Reward,
    *,
    images: Any,
    out: str | Path | None = None,
    work: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    recipe: FinetuneSettings | None = None,
    searched: SearchResult | None = None,
    progress: bool = True,
    **settings: Any,
) -> StitchedValue:
    """Search every interface, build the best one, finetune it and save it to ``out``.

    ``images`` is a folder, a dataset or tensors (:func:`open_images`). ``work`` keeps the search, the caches and the
    checkpoint, so that an interrupted call goes on where it stopped (default ``out/work``; without either, a temporary
    folder). ``prompts`` are what generated examples are drawn for (default: the null prompt). ``searched`` is the
    result of an earlier :func:`search`. ``settings`` are the fields of :class:`StitchSettings`.

    Raises ``UnknownNameError``, ``ConfigError``, ``DataError``, ``WeightsError``, ``OutputError``,
    ``NonFiniteError``, each saying what to do.
    """
    chosen = _settings(settings)
    recipe = recipe or FinetuneSettings(seed=chosen.seed)
    folder = make_folder(out) if out is not None else None
    if work is None and folder is None:
        with tempfile.TemporaryDirectory(prefix="stitchvm-") as temporary:
            return stitch(
                backbone, reward, images=images, work=temporary, prompts=prompts, recipe=recipe, searched=searched,
                progress=progress, **settings,
            )  # fmt: skip
    work = make_folder(work if work is not None else folder / "work")  # type: ignore[operator]
    backbone, reward, source = load_backbone(backbone), load_reward(reward), open_images(images, chosen.count)
    with CostMeter() as cost:
        result = searched or run_search(backbone, reward, source, chosen, progress)
        interface = Interface(*chosen.interface) if chosen.interface else result.best
        value = initial_value(backbone, reward, result, interface, positions=chosen.positions)
        real, generated = training_examples(backbone, reward, source, prompts, recipe, chosen, work, progress)
        run = {"interface": attrs.asdict(interface), "positions": chosen.positions, "recipe": attrs.asdict(recipe),
               "pair": [model_identity(backbone), model_identity(reward)], "images": source.fingerprint()}  # fmt: skip
        checkpoint = work / f"finetune-{cache_key(run)}"
        losses = finetune(value, real, recipe, samples=generated, checkpoint=checkpoint, progress=progress)
    value.requires_grad_(False)
    value.provenance = Provenance(
        recipe=attrs.asdict(recipe),
        search=result.report(),
        metrics={"final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 6), "skipped_images": len(source.skipped)},
        cost=cost.report(),
        seed=recipe.seed,
    )
    if folder is not None:
        value.save_pretrained(folder)
        plots.loss_curve(losses, folder / "loss.png")
    return value


def _settings(given: dict[str, Any]) -> StitchSettings:
    known = {field.name for field in attrs.fields(StitchSettings)}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"stitch got unknown settings {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    return StitchSettings(**given)


def run_search(
    backbone: Backbone, reward: Reward, source: ImageSource, settings: StitchSettings, progress: bool = True
) -> SearchResult:
    """Stage 1 under these settings; a fixed ``interface`` is only fitted, not compared."""
    cuts: tuple[int, ...] | None = settings.cuts
    blocks: tuple[int, ...] | None = settings.blocks
    if settings.interface is not None:
        cuts, blocks = (settings.interface[0],), (settings.interface[1],)
    return search(
        backbone, reward, images=source, cuts=cuts, blocks=blocks, probes=settings.probes, criterion=settings.criterion,
        positions=settings.positions, resolution=settings.resolution, batch=settings.batch, seed=settings.seed,
        progress=progress,
    )  # fmt: skip


def initial_value(
    backbone: Backbone, reward: Reward, result: SearchResult, interface: Interface, *, positions: bool = False
) -> StitchedValue:
    """The closed-form value model at one interface, before stage 2."""
    branch = result.branch(reward, interface, positions=positions)
    for parameter in branch.parameters():
        parameter.requires_grad_(True)
    name = name_of(reward)
    return StitchedValue(Head(backbone, interface.i), {name: branch}, backbone.null_condition(), rewards={name: reward})


def training_examples(
    backbone: Backbone,
    reward: Reward,
    source: ImageSource,
    prompts: Sequence[str] | None,
    recipe: FinetuneSettings,
    settings: StitchSettings,
    work: Path,
    progress: bool = True,
) -> tuple[Examples | None, Examples | None]:
    """The caches of real and generated examples that the recipe's mix needs."""
    side = settings.resolution or backbone.native_resolution
    pair = {"backbone": model_identity(backbone), "reward": model_identity(reward), "resolution": side}
    rewards = {name_of(reward): reward}
    real = generated = None
    if recipe.generated < 1:
        key = {**pair, "images": source.fingerprint(), "count": settings.count}
        latents = from_images(backbone, source, settings.count, side, settings.batch)
        real = build_examples(
            work / f"images-{cache_key(key)}",
            latents,
            rewards,
            key,
            settings.count,
            label="cache images",
            progress=progress,
        )
    if recipe.generated > 0:
        asked = list(prompts) if prompts is not None else [""]
        key = {**pair, "prompts": cache_key({"prompts": asked}), "count": settings.samples,
               "generation": attrs.asdict(settings.generation), "scored": True}  # fmt: skip
        drawn = from_samples(backbone, asked, settings.samples, side, settings.batch, settings.generation)
        generated = build_examples(
            work / f"samples-{cache_key(key)}",
            drawn,
            rewards,
            key,
            settings.samples,
            label="cache samples",
            progress=progress,
        )
    return real, generated
