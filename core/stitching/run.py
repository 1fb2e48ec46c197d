"""``stitch``: search, join and finetune a pair, from names or objects to a saved value model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .. import plots
from ..artefact import Provenance
from ..backbone import Backbone
from ..costs import CostMeter
from ..errors import ConfigError
from ..files import cache_key, make_folder
from ..images import ImageSource, open_images
from ..joint import JointReward, checked_weights, load_rewards
from ..loading import load_backbone
from ..lora import with_lora
from ..provenance import network_identity, weights_digest
from ..reward import Reward
from ..sampling import chosen_guidance, guided
from ..slicing import LATENT
from ..value import StitchedValue
from .batches import Batches
from .beginnings import begun, closed_form, known_search, run_search
from .examples import Examples, GenerationSettings, build_examples, from_images, from_samples
from .finetune import finetune
from .finetune_settings import FinetuneSettings
from .search_result import JointSearch, SearchResult
from .stitch_settings import StitchSettings, settings_of
from .texts import encode_all
from .transfer import Teacher, transfer

VAE_STITCHING: dict[str, Any] = {"cuts": (LATENT,), "blocks": (1,)}
"""The settings of :func:`stitch` that make the baseline: the latent itself, before the reward's first block."""


def stitch(
    backbone: str | Backbone,
    reward: str | Reward | Sequence[str | Reward] | JointReward,
    *,
    images: Any,
    out: str | Path | None = None,
    work: str | Path | None = None,
    weights: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
    recipe: FinetuneSettings | None = None,
    searched: SearchResult | JointSearch | None = None,
    start_from: str | Path | None = None,
    transfer_from: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> StitchedValue:
    """Search every interface, build the best one, finetune it and save it to ``out``.

    Several rewards share one head, cut where the sum of their criteria is lowest; the value is their sum with
    ``weights`` (1 each by default). ``images`` is a folder, a dataset or tensors (:func:`open_images`). ``work`` keeps
    the search, the caches and the checkpoint, so that an interrupted call goes on where it stopped (default
    ``out/work``; without either, a temporary folder). ``prompts`` are what generated examples are drawn for (default:
    the null prompt). ``recipe`` is a named one (``core.recipe("full")``) or one of your own; the paper's by default.
    ``searched`` is the result of an earlier :func:`search` or :func:`search_jointly`, whose ``cuts``, ``blocks`` and
    ``taps`` hold. ``start_from`` is a value model of the same pair, whose layers and tails are finetuned further in
    place of a search and its closed form. ``transfer_from`` is one of another backbone with the same latents: its tails
    are taken over, and layers fitted to what its own give, after the best of ``cuts`` (:func:`transfer`). ``settings``
    are the fields of :class:`StitchSettings`.

    Raises ``UnknownNameError``, ``ConfigError``, ``DataError``, ``WeightsError``, ``ArtefactError``, ``OutputError``,
    ``NonFiniteError``, and ``PluginLoadError`` for ``loras`` without peft, each saying what to do.
    """
    begun_with: dict[str, Any] = {"searched": searched, "start_from": start_from, "transfer_from": transfer_from}
    chosen = settings_of(settings, begun_with)
    recipe = _conditioned(recipe or FinetuneSettings(seed=chosen.seed), chosen.conditioning)
    folder = make_folder(out) if out is not None else None
    if work is None and folder is None:
        with tempfile.TemporaryDirectory(prefix="stitchvm-") as temporary:
            return stitch(
                backbone, reward, images=images, work=temporary, weights=weights, prompts=prompts, recipe=recipe,
                **begun_with, progress=progress, **settings,
            )  # fmt: skip
    work = make_folder(work if work is not None else folder / "work")  # type: ignore[operator]
    asked = chosen.generation.guidance_scale, chosen.embedded_guidance
    (backbone, _), source = guided(load_backbone(backbone), *asked), open_images(images, chosen.count)
    rewards = load_rewards(reward, backbone.device)
    if weights is None and isinstance(reward, JointReward):
        weights = reward.weights
    if weights is not None:
        weights = checked_weights(tuple(rewards), weights)
    if chosen.loras and recipe.generated == 0:
        raise ConfigError("loras take turns in drawing samples, but the recipe takes none; set generated above 0.")
    tuned = tuple(with_lora(backbone, each) for each in chosen.loras)
    with CostMeter() as cost:
        value = teacher = None
        if transfer_from is not None:
            teacher = Teacher.of(transfer_from, backbone, rewards, prompts, chosen.cuts, chosen.taps)
        elif start_from is not None:
            value = begun(start_from, backbone, rewards, weights)
        else:
            found = known_search(searched, rewards) or run_search(backbone, rewards, source, chosen, progress)
            value = closed_form(backbone, rewards, found, weights, chosen)
        # before hours of sampling, should any be missing
        read = encode_all(backbone, prompts) if recipe.prompted > 0 else None
        real, generated = training_examples(backbone, rewards, source, prompts, recipe, chosen, work, progress, tuned)
        if teacher is not None:
            value = transfer(
                teacher, backbone, rewards, Batches.of(backbone, real, generated, recipe), read,
                weights=weights, progress=progress,
            )  # fmt: skip
            teacher = None  # lets go of its backbone
        assert value is not None
        value.prompted = recipe.prompted > 0
        run = _run_identity(value, recipe, source, chosen)
        run |= {name: each.folder.name for name, each in (("real", real), ("samples", generated)) if each is not None}
        if start_from is not None or transfer_from is not None:
            run |= {"start_from": weights_digest(value.branches)}
        checkpoint = work / f"finetune-{cache_key(run)}"
        losses = finetune(
            value, real, recipe, samples=generated, prompts=read, checkpoint=checkpoint, progress=progress
        )
    value.requires_grad_(False)
    value.provenance = Provenance(
        recipe=attrs.asdict(recipe),
        search=value.provenance.search,
        metrics={"final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 6), "skipped_images": len(source.skipped)},
        cost=cost.report(),
        seed=recipe.seed,
        examples=_learned_from(real, generated, backbone, _generation(backbone, recipe, chosen), tuned),
    )
    if folder is not None:
        value.save_pretrained(folder)
        plots.loss_curve(losses, folder / "loss.png")
    return value


def _generation(backbone: Backbone, recipe: FinetuneSettings, settings: StitchSettings) -> GenerationSettings:
    """How samples are drawn: their states on the way are kept for recipes that read them there."""
    scale = chosen_guidance(backbone, settings.generation.guidance_scale)
    states = settings.generation.states if recipe.on_policy > 0 else 0
    return attrs.evolve(settings.generation, guidance_scale=scale, states=states)


def _learned_from(
    real: Examples | None, generated: Examples | None, backbone: Backbone, generation: GenerationSettings,
    tuned: Sequence[Backbone],
) -> dict[str, Any]:  # fmt: skip
    """How many pictures and samples, and how the samples were drawn; JSON-able."""
    found: dict[str, Any] = {} if real is None else {"images": len(real)}
    if generated is None:
        return found
    embedded = {} if backbone.guidance is None else {"embedded_guidance": backbone.guidance}
    drawn = {**attrs.asdict(generation), **embedded, **_digests(tuned)}
    return {**found, "samples": len(generated), "drawn by": drawn}


def _digests(tuned: Sequence[Backbone]) -> dict[str, Any]:
    """Which networks drew beside the backbone, if any did."""
    return {"tuned": [weights_digest(each.net) for each in tuned]} if tuned else {}


def _run_identity(
    value: StitchedValue, recipe: FinetuneSettings, source: ImageSource, settings: StitchSettings
) -> dict[str, Any]:
    """What a finetune is known by; one that takes taps says so, others need not."""
    blocks = _one_or_all([value.interface(name).j for name in value.names])
    taps = {"taps": value.head.taps} if value.head.taps else {}
    learned = attrs.asdict(recipe)
    learned.pop("checkpoint_every")
    pair = (value.head.part, *(value.reward(name) for name in value.names))
    return {"interface": {"i": value.head.cut, "j": blocks, **taps},
            "positions": settings.positions, "recipe": learned, "images": source.fingerprint(),
            "search": {"probes": (value.provenance.search or {}).get("probes"), "seed": settings.seed},
            "pair": [network_identity(network) for network in pair]}  # fmt: skip


def _conditioned(recipe: FinetuneSettings, conditioning: str | None) -> FinetuneSettings:
    """The recipe with what the head reads; :class:`ConfigError` where there is no prompt to read."""
    if conditioning is None:
        return recipe
    if conditioning == "prompt" and recipe.generated == 0:
        raise ConfigError(
            "conditioning is 'prompt', but the recipe takes no samples, which alone have one; set generated above 0."
        )
    return attrs.evolve(recipe, prompted=float(conditioning == "prompt"))


def _one_or_all(entries: Sequence[Any]) -> Any:
    """The only entry, or all of them: what keys are made of, so that those of one reward are what they always were."""
    return entries[0] if len(entries) == 1 else list(entries)


def training_examples(
    backbone: Backbone,
    rewards: Mapping[str, Reward],
    source: ImageSource,
    prompts: Sequence[str] | None,
    recipe: FinetuneSettings,
    settings: StitchSettings,
    work: Path,
    progress: bool = True,
    tuned: Sequence[Backbone] = (),
) -> tuple[Examples | None, Examples | None]:
    """The caches of real and generated examples that the recipe's mix needs, with the targets of all rewards; the
    ``tuned`` networks draw too."""
    side = settings.resolution or backbone.native_resolution
    judges = _one_or_all([network_identity(reward) for reward in rewards.values()])
    pair = {"backbone": network_identity(backbone), "reward": judges, "resolution": side}
    # caches of recipes that compare no hidden states are keyed as if there were none
    kept = {"keep_images": True} if recipe.hidden_weight else {}
    real = generated = None
    if recipe.generated < 1:
        key = {**pair, "images": source.fingerprint(), "count": settings.count, "decoded": recipe.decoded, **kept}
        latents = from_images(backbone, source, settings.count, side, settings.batch, recipe.decoded)
        real = build_examples(
            work / f"images-{cache_key(key)}",
            latents,
            rewards,
            key,
            settings.count,
            label="cache images",
            progress=progress,
            **kept,
        )
    if recipe.generated > 0:
        asked = list(prompts) if prompts is not None else [""]
        generation = _generation(backbone, recipe, settings)
        key = {**pair, "prompts": cache_key({"prompts": asked}), "count": settings.samples,
               "generation": attrs.asdict(generation), "scored": True, **kept, **_digests(tuned)}  # fmt: skip
        drawn = from_samples(backbone, asked, settings.samples, side, settings.batch, generation, tuned)
        generated = build_examples(
            work / f"samples-{cache_key(key)}",
            drawn,
            rewards,
            key,
            settings.samples,
            label="cache samples",
            progress=progress,
            **kept,
        )
    return real, generated
