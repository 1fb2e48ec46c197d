"""Stage 1: choose where to cut both networks, from one streamed pass over a probe set (paper, section 2).

For every backbone cut ``i`` and reward block ``j`` the best linear map from the noisy latent's features to the clean
image's is fitted in closed form. Memory depends on channel counts only, not on the number of probe images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import ConfigError, DataError
from ..grids import resample, side_by_side
from ..images import ImageSource, open_images
from ..joint import load_rewards
from ..loading import load_backbone
from ..progress import track
from ..records import name_of
from ..reward import Reward
from ..sampling import seeded_noise
from ..seeds import stream_seed
from ..slicing import LATENT, checked_cuts, checked_taps
from .criteria import closed_form_losses, functional_losses
from .regression import RegressionStatistics
from .search_result import CRITERIA, Criterion, JointSearch, Probe, SearchResult

DEEPEST_BLOCK = 4
"""Deeper cuts of the reward are not recoverable by finetuning (paper, section 2)."""

JUDGED_EVERY = 4
"""Every fourth probe image is held out from the fit, to judge the functional criterion."""


Blocks = Sequence[int] | Mapping[str, Sequence[int]] | None
"""Reward blocks to enter before: the same for all rewards, or by reward; by default the first four of each."""


def search(
    backbone: str | Backbone,
    reward: str | Reward,
    *,
    images: Any,
    cuts: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    taps: Sequence[int] = (),
    probes: int = 200,
    criterion: Criterion = "functional",
    positions: bool = False,
    resolution: int | None = None,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Fit and rank every pair of backbone cut in ``cuts`` (default: after every block) and reward block in ``blocks``
    (default: the first four). ``taps`` are earlier cuts that every layer reads beside its own, where they come before
    it: late features know what the image will be, early ones where every detail of the latent lies.

    ``images`` is anything :func:`open_images` takes; the first ``probes`` of them are used, one noise level each,
    uniform in [0, 1]. A quarter is held out to judge the functional criterion, which follows ``positions`` (see
    ``Reward.enter``).

    Raises ``ConfigError`` for an unknown criterion, ``SliceError`` for a cut or tap out of range, ``DataError`` for
    fewer than four images.
    """
    joint = search_jointly(
        backbone, [reward], images=images, cuts=cuts, blocks=blocks, taps=taps, probes=probes, criterion=criterion,
        positions=positions, resolution=resolution, batch=batch, seed=seed, progress=progress,
    )  # fmt: skip
    (result,) = joint.results.values()
    return result


def search_jointly(
    backbone: str | Backbone,
    rewards: Sequence[str | Reward] | Mapping[str, Reward],
    *,
    images: Any,
    cuts: Sequence[int] | None = None,
    blocks: Blocks = None,
    taps: Sequence[int] = (),
    probes: int = 200,
    criterion: Criterion = "functional",
    positions: bool = False,
    resolution: int | None = None,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> JointSearch:
    """:func:`search` for several rewards at once: images are encoded, noised and passed through the backbone once."""
    if criterion not in CRITERIA:
        raise ConfigError(f"unknown search criterion {criterion!r}; choose one of {', '.join(CRITERIA)}.")
    backbone = load_backbone(backbone)
    loaded = load_rewards(rewards, backbone.device)
    cuts, taps = checked_cuts(backbone, cuts), checked_taps(backbone, taps, backbone.depth)
    entered = {name: _blocks(reward, name, blocks) for name, reward in loaded.items()}
    source = open_images(images, probes)
    stream = ProbeStream(backbone, loaded, source, cuts, probes, resolution, batch, seed, progress, taps)
    fits = _fit(stream, entered)
    results = {name: fit.result(name_of(backbone), name, criterion, stream) for name, fit in fits.items()}
    judged = functional_losses(results, loaded, stream.batches(held=True), positions=positions)
    for name, losses in judged.items():
        results[name].losses["functional"] = losses
    return JointSearch(results)


def _blocks(reward: Reward, name: str, blocks: Blocks) -> tuple[int, ...]:
    """The blocks of one reward to try, checked."""
    asked = blocks.get(name) if isinstance(blocks, Mapping) else blocks
    chosen = tuple(range(1, min(DEEPEST_BLOCK, reward.depth) + 1)) if asked is None else tuple(asked)
    for j in chosen:
        reward.check_cut(j - 1, lowest=0)
    return chosen


@attrs.define(eq=False)
class ProbeStream:
    """Probe batches, the same noise every time: image ``n`` has its own noise and level, drawn from ``(seed, n)``."""

    backbone: Backbone
    rewards: Mapping[str, Reward]
    source: ImageSource
    cuts: tuple[int, ...]
    probes: int
    resolution: int | None
    batch: int
    seed: int
    progress: bool
    taps: tuple[int, ...] = ()
    seen: int = 0

    @torch.no_grad()
    def batches(self, *, held: bool) -> Iterator[Probe]:
        """The images to fit on, or those held out from the fit."""
        side = self.resolution or self.backbone.native_resolution
        null = self.backbone.null_condition().to(self.backbone.device)
        label = "search: judge" if held else "search: fit"
        chunks = self.source.batches(side, self.batch, limit=self.probes)
        self.seen = 0
        for chunk in track(chunks, label, -(-self.probes // self.batch), self.progress):
            numbers = range(self.seen, self.seen + len(chunk))
            self.seen += len(chunk)
            rows = [row for row, n in enumerate(numbers) if (n % JUDGED_EVERY == JUDGED_EVERY - 1) == held]
            if not rows:
                continue
            images = chunk[rows].to(self.backbone.device)
            noisy = self._noisy(images, [stream_seed(self.seed, numbers[row]) for row in rows])
            features = dict(features_by_cut(self.backbone, noisy, null.expand(len(rows)), self.cuts, self.taps))
            yield Probe({name: reward.preprocess(images) for name, reward in self.rewards.items()}, features)

    def _noisy(self, images: Tensor, seeds: list[int]) -> Any:
        clean = self.backbone.encode_images(images)
        draws = seeded_noise(seeds, (clean[0].numel() + 1,), clean.device)
        sigma = torch.special.ndtr(draws[:, 0])
        latents = self.backbone.path.add_noise(clean, draws[:, 1:].reshape(clean.shape), sigma)
        return self.backbone.noisy(latents, sigma)


def features_by_cut(
    backbone: Backbone, noisy: Any, condition: Any, cuts: tuple[int, ...], taps: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """``[B, C, H, W]`` at every cut, beside those of the ``taps`` before it; in one pass."""
    if LATENT in cuts:
        yield LATENT, backbone.input_grid(noisy)
    last = max(cuts)
    if last == LATENT:
        return
    tapped: dict[int, Tensor] = {}
    for cut, grid in backbone.features(noisy, condition):
        if cut in cuts:
            yield cut, side_by_side([*tapped.values(), grid])
        if cut in taps:
            tapped[cut] = grid
        if cut == last:
            return


@attrs.define(eq=False)
class _Fit:
    """One reward's running statistics: a regression a backbone cut, and its prefix tokens a block."""

    reward: Reward
    blocks: tuple[int, ...]
    statistics: dict[int, RegressionStatistics]
    images: int = 0
    prefix_sums: dict[int, Tensor] = attrs.field(factory=dict)

    def add(self, pixels: Tensor, features: Mapping[int, Tensor]) -> None:
        states = dict(_states(self.reward, pixels, self.blocks))
        targets = torch.cat([rows_of(self.reward.grid(states[j])) for j in self.blocks], dim=1)
        for j in self.blocks:
            tokens = self.reward.prefix(states[j]).double().sum(0)
            self.prefix_sums[j] = self.prefix_sums[j] + tokens if j in self.prefix_sums else tokens
        for cut, grid in features.items():
            self.statistics[cut].add(rows_of(resample(grid, self.reward.grid_size)), targets)
        self.images += len(pixels)

    def result(self, backbone: str, name: str, criterion: Criterion, stream: ProbeStream) -> SearchResult:
        """The closed-form maps, mean prefix tokens and what comes with the fit; the functional losses are not in it."""
        maps = {cut: found.solve() for cut, found in self.statistics.items()}
        prefixes = {j: total / self.images for j, total in self.prefix_sums.items()}
        losses = closed_form_losses(maps, self.blocks)
        return SearchResult(backbone, name, criterion, self.blocks, losses, maps, prefixes, stream.seen, stream.taps)


def _fit(stream: ProbeStream, blocks: Mapping[str, tuple[int, ...]]) -> dict[str, _Fit]:
    """Every reward's regressions, from one pass over the images to fit on."""
    fits = {
        name: _Fit(reward, blocks[name], {cut: RegressionStatistics() for cut in stream.cuts})
        for name, reward in stream.rewards.items()
    }
    for probe in stream.batches(held=False):
        for name, fit in fits.items():
            fit.add(probe.pixels[name], probe.features)
    if stream.seen < JUDGED_EVERY:
        raise DataError(
            f"search needs at least {JUDGED_EVERY} probe images, {stream.source.name!r} gave {stream.seen}."
        )
    return fits


def _states(reward: Reward, pixels: Tensor, blocks: tuple[int, ...]) -> Iterator[tuple[int, Any]]:
    """The clean image's state at cut ``j - 1`` for every ``j``."""
    state, cut = reward.stem(pixels, None), 0
    for j in sorted(blocks):
        state, cut = reward.run(state, cut, j - 1), j - 1
        yield j, state


def rows_of(grid: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B * H * W, C]``."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)
