"""Stage 2's training examples, computed once and kept on disk: clean latents and what the rewards say of them.

A cache is a folder of safetensors shards, each written whole, so that building one can be interrupted and goes on
where it stopped. Latents come from images, from the backbone's own samples, or from a mix of two caches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from ..backbone import Backbone
from ..conditions import Condition
from ..errors import ArtefactError, DataError
from ..files import make_folder, read_json, write_json, write_tensors
from ..images import ImageSource
from ..paths import Prediction
from ..processes import join_group
from ..progress import track
from ..reward import Reward
from ..sampling import Denoiser, chosen_guidance, sample, seeded_noise
from ..seeds import stream_seed

SHARD = 256
"""Examples in a shard: what an interruption can cost."""


@attrs.frozen(eq=False)
class States:
    """A sampler's own noisy ``latents [B, S, C, h, w]`` at ``sigmas [S]``."""

    latents: Tensor
    sigmas: Tensor


@attrs.frozen(eq=False)
class CleanBatch:
    """``latents [B, C, h, w]``, their ``images [B, 3, H, W]`` in [0, 1], the prompts they were drawn for (or None) with
    their ``numbers [B]`` in the list of prompts, and the ``states`` the sampler passed through (or None)."""

    latents: Tensor
    images: Tensor
    prompts: tuple[str, ...] | None = None
    numbers: Tensor | None = None
    states: States | None = None


Latents = Callable[[int], Iterator[CleanBatch]]
"""``from_example -> batches``, each at most ``SHARD`` long."""

CONDITION = "condition."
"""Prefix of the columns that hold what a reward's score was compared with."""

PROMPT = "prompt"
"""The column that tells which examples were drawn for one prompt: its number in the list of prompts."""

IMAGES = "images"
"""The column of the judged images themselves, ``[3, H, W]`` an example, uint8, where hidden states are compared."""

STATES, STATE_SIGMAS = "states", "state_sigmas"
"""The columns of the sampler's own states, ``[S, C, h, w]`` an example, and of their noise levels, ``[S]``."""


@attrs.frozen(eq=False)
class Examples:
    """A finished cache, read lazily: ``len`` examples in shards of ``SHARD``."""

    folder: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The chosen examples' tensors, stacked in the order asked for, floating ones in float32."""
        by_shard: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            by_shard.setdefault(row // SHARD, []).append(position)
        columns: dict[str, list[Tensor]] = {}
        order: list[int] = []
        for shard, positions in by_shard.items():
            order += positions
            within = [rows[p] % SHARD for p in positions]
            with safe_open(_shard(self.folder, shard), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the handle is not iterable
                    # the file is mapped into memory, of which indexing reads the rows alone
                    columns.setdefault(name, []).append(file.get_tensor(name)[within])
        back = torch.argsort(torch.tensor(order))
        joined = {name: torch.cat(parts)[back] for name, parts in columns.items()}
        return {name: t.float() if t.is_floating_point() else t for name, t in joined.items()}

    def column(self, name: str) -> Tensor | None:
        """One tensor of every example, stacked, in float32; None where this cache has no such column."""
        parts = []
        for number in range(-(-self.count // SHARD)):
            with safe_open(_shard(self.folder, number), framework="pt") as file:
                if name not in file.keys():  # noqa: SIM118 - the handle is not iterable
                    return None
                parts.append(file.get_tensor(name).float())
        return torch.cat(parts)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def from_images(
    backbone: Backbone, source: ImageSource, count: int | None, resolution: int, batch: int, decoded: float = 0.0
) -> Latents:
    """Latents of real images, in the source's order; a share of them, evenly spread, with their decoding as the
    image."""

    def produce(start: int) -> Iterator[CleanBatch]:
        limit = None if count is None else count - start
        first = start
        for images in source.batches(resolution, batch, limit=limit, skip=start):
            images = images.to(backbone.device)
            latents = backbone.encode_images(images)
            numbers = range(first, first + len(images))
            rows = [row for row, n in enumerate(numbers) if int((n + 1) * decoded) > int(n * decoded)]
            if rows:
                images[rows] = backbone.decode_latents(latents[rows]).clamp(0, 1).to(images)
            first += len(images)
            yield CleanBatch(latents, images)

    return produce


@attrs.frozen
class GenerationSettings:
    """How the backbone's own samples are drawn: plain ODE sampling, ``steps`` steps, classifier-free
    ``guidance_scale`` (None: 3, or 1 for a network distilled to need none); ``states`` of the latents on the way are
    kept with each, spread evenly over the steps."""

    steps: int = attrs.field(default=28, validator=attrs.validators.gt(0))
    guidance_scale: float | None = None
    seed: int = 0
    states: int = attrs.field(default=14, validator=attrs.validators.ge(0))

    def kept_steps(self) -> tuple[int, ...]:
        """Before which steps the latents are kept."""
        return tuple(sorted({k * self.steps // self.states for k in range(self.states)})) if self.states else ()


def from_samples(
    backbone: Backbone, prompts: Sequence[str], count: int, resolution: int, batch: int, settings: GenerationSettings,
    tuned: Sequence[Backbone] = (),
) -> Latents:  # fmt: skip
    """The backbone's own samples; example ``n`` has prompt ``n mod len(prompts)`` and a seed of its own.

    With ``tuned`` networks over the backbone it and they take turns, from prompt to prompt and from one sample of a
    prompt to the next. Samples of the null prompt, ``""``, were drawn for nothing that a reward could compare them
    with.
    """
    side = resolution // backbone.latent_factor
    sigmas = backbone.sigmas(settings.steps, (side, side))
    kept, samplers = settings.kept_steps(), (backbone, *tuned)
    scale = chosen_guidance(backbone, settings.guidance_scale)

    def drawn(sampler: Backbone, null: Condition, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        condition = sampler.encode_prompts([prompts[n % len(prompts)] for n in numbers]).to(backbone.device)
        denoiser = Denoiser(sampler, condition, null, scale)
        seeds = [stream_seed(settings.seed, n) for n in numbers]
        noise = seeded_noise(seeds, (backbone.latent_channels, side, side), backbone.device)
        passed: list[Tensor] = []

        def keep(step: int, latents: Tensor, _: Prediction) -> None:
            if step in kept:
                passed.append(latents)

        latents = sample(denoiser, noise, sigmas, callback=keep)
        return latents, torch.stack(passed, 1) if kept else latents.new_empty(len(numbers), 0)

    def produce(start: int) -> Iterator[CleanBatch]:
        null = backbone.null_condition().to(backbone.device)
        for first in range(start, count, batch):
            numbers = range(first, min(first + batch, count))
            turns = [sum(divmod(n, len(prompts))) % len(samplers) for n in numbers]
            order = sorted(range(len(numbers)), key=turns.__getitem__)
            parts = [drawn(samplers[turn], null, [numbers[row] for row in rows])
                     for turn, rows in groupby(order, key=turns.__getitem__)]  # fmt: skip
            back = torch.argsort(torch.tensor(order)).to(backbone.device)
            latents, passed = (torch.cat(column)[back] for column in zip(*parts, strict=True))
            images = backbone.decode_latents(latents).clamp(0, 1)
            states = States(passed, sigmas[list(kept)]) if kept else None
            asked = tuple(prompts[n % len(prompts)] for n in numbers)
            if all(asked):
                yield CleanBatch(latents, images, asked, torch.tensor([n % len(prompts) for n in numbers]), states)
            else:
                yield CleanBatch(latents, images, states=states)

    return produce


@torch.no_grad()
def build_examples(
    folder: Path,
    latents: Latents,
    rewards: Mapping[str, Reward],
    settings: Mapping[str, Any],
    count: int | None,
    *,
    label: str,
    progress: bool = True,
    keep_images: bool = False,
) -> Examples:
    """Fill a cache folder, or go on filling it, or just open it. ``keep_images`` keeps what the rewards were shown.

    ``settings`` is everything the content depends on; a folder made with other settings is refused with
    ``ArtefactError``. A source that runs out before ``count`` gives fewer examples; an empty one raises ``DataError``.
    Processes that a launcher started make equally many shards each and wait for one another; the folder must be one
    that all of them see.
    """
    folder = make_folder(folder)
    _claim(folder, settings)
    if (folder / "done.json").exists():
        return Examples(folder, read_json(folder / "done.json")["count"])
    group = join_group(next(iter(rewards.values())).device)
    own = _own_shards(count, group)
    made = _missing(folder, own, lambda number: _shards(latents(number * SHARD), rewards, keep_images))
    bar_total = None if count is None else sum(not _shard(folder, number).exists() for number in own)
    for number, shard in track(made, label, bar_total, progress and group.is_main_process):
        write_tensors(_shard(folder, number), shard)
    group.wait_for_everyone()
    total = _made(folder)
    if not total:
        raise DataError(f"{label}: there is nothing to train on; the source gave no latents.")
    if group.is_main_process:
        write_json(folder / "done.json", {"count": total})
    return Examples(folder, total)


def _own_shards(count: int | None, group: Accelerator) -> range:
    """The numbers of the shards that this process makes, next to each other, so that its source is read once through;
    a source of unknown length is the first process's alone."""
    if count is None:
        return range(sys.maxsize if group.is_main_process else 0)
    first, end = (-(-count // SHARD) * (group.process_index + k) // group.num_processes for k in (0, 1))
    return range(first, end)


def _missing(
    folder: Path, own: range, produce: Callable[[int], Iterator[dict[str, Tensor]]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The shards of ``own`` that the folder lacks, with their numbers; ``produce`` makes those from a number on."""
    number = own.start
    while number < own.stop:
        if _shard(folder, number).exists():
            number += 1
            continue
        for shard in produce(number):
            yield number, shard
            number += 1
            if number >= own.stop or _shard(folder, number).exists():
                break
        else:
            return  # the source has no more


def _made(folder: Path) -> int:
    """How many examples the shards hold, from the first to where one is missing."""
    full = 0
    while _shard(folder, full + 1).exists():
        full += 1
    if not _shard(folder, full).exists():
        return 0
    with safe_open(_shard(folder, full), framework="pt") as file:
        return full * SHARD + int(file.get_slice("latents").get_shape()[0])


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    known = read_json(path)
    wanted = json.loads(json.dumps(settings))
    differ = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
    if differ:
        raise ArtefactError(
            f"cache {str(folder)!r} was made with other settings ({', '.join(differ)}). Delete it or choose another."
        )


def _shards(
    batches: Iterator[CleanBatch], rewards: Mapping[str, Reward], keep_images: bool
) -> Iterator[dict[str, Tensor]]:
    """Batches with the rewards' targets, regrouped into shards of ``SHARD``."""
    waiting: dict[str, Tensor] = {}
    for batch in batches:
        fresh = {"latents": batch.latents.float()}
        if keep_images:
            fresh[IMAGES] = (batch.images.clamp(0, 1) * 255).round().byte()
        if batch.numbers is not None:
            fresh[PROMPT] = batch.numbers.float()
        if batch.states is not None:
            fresh[STATES] = batch.states.latents.half()
            fresh[STATE_SIGMAS] = batch.states.sigmas.float().expand(len(batch.latents), -1)
        for name, reward in rewards.items():
            fresh |= {f"{name}/{key}": target for key, target in _targets(reward, batch).items()}
        waiting = {k: torch.cat([waiting[k], v]) for k, v in fresh.items()} if waiting else fresh
        while len(waiting["latents"]) >= SHARD:
            yield {k: v[:SHARD] for k, v in waiting.items()}
            waiting = {k: v[SHARD:] for k, v in waiting.items()}
    if waiting and len(waiting["latents"]):
        yield waiting


def _targets(reward: Reward, batch: CleanBatch) -> dict[str, Tensor]:
    """What a value model learns to predict; a score needs no condition or the prompt that the sample was drawn for."""
    output = reward.judge(batch.images)
    targets = {"embedding": output.embedding.float(), "tokens": output.tokens.half()}
    if output.score is not None:
        targets["score"] = output.score.float()
    elif reward.condition_kind == "prompts" and batch.prompts is not None:
        condition = reward.encode_prompts(list(batch.prompts)).to(output.embedding.device)
        targets["score"] = reward.score(output, condition).float()
        targets |= {f"{CONDITION}{key}": tensor.float() for key, tensor in condition.tensors.items()}
    return targets
