"""What a stitch will cost, before any weight is downloaded: metered on meta tensors at full size.

Nothing here is measured on a device: floating-point operations are counted and bytes of weights and activations summed
up, so that a plan is a matter of seconds. Text encoders, which run once a prompt, and what a device's own libraries
take are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from ..backbone import Backbone
from ..branch import Interface
from ..errors import ConfigError
from ..loading import as_dtype, build_geometry
from ..records import BackboneRecord, RewardRecord
from ..registries import registry
from ..reward import Reward
from ..slicing import checked_taps
from ..stitching.searching import DEEPEST_BLOCK, JUDGED_EVERY
from .metered_networks import Cost, MeteredBackbone, MeteredReward, MeteredValue, layer_cost

ADAM = 4
"""Copies of a trained tensor: itself, its gradient and AdamW's two moments."""

GIGABYTE = 10**9


@attrs.frozen(kw_only=True)
class PlanSettings:
    """What is planned for.

    ``resolution`` in image pixels (the backbone's own by default); ``cut`` the backbone block after which (half of them
    by default: the search decides) and ``block`` the reward's before which they are joined; ``taps``, earlier cuts that
    layers read too; ``probes`` and ``probe_batch`` of the search; ``images`` an epoch has, ``cache_batch`` and
    ``batch`` those that are judged and trained on at once; ``rollouts`` and their denoising ``steps`` of a Monte Carlo
    estimate.
    """

    resolution: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0)))
    cut: int | None = None
    block: int = 1
    taps: tuple[int, ...] = ()
    probes: int = attrs.field(default=200, validator=attrs.validators.ge(JUDGED_EVERY))
    probe_batch: int = attrs.field(default=16, validator=attrs.validators.gt(0))
    images: int = attrs.field(default=100_000, validator=attrs.validators.gt(0))
    cache_batch: int = attrs.field(default=32, validator=attrs.validators.gt(0))
    batch: int = attrs.field(default=128, validator=attrs.validators.gt(0))
    rollouts: int = attrs.field(default=4, validator=attrs.validators.gt(0))
    steps: int = attrs.field(default=28, validator=attrs.validators.gt(0))


@attrs.frozen
class Need:
    """Of a job: all its ``flops``, its ``memory`` at the batch it runs at, ``fixed`` of that whatever the batch (mostly
    weights), and what one ``sample`` of the batch adds; all in bytes but the first."""

    flops: int
    fixed: int
    sample: int
    batch: int

    @property
    def memory(self) -> int:
        return self.fixed + self.batch * self.sample

    def largest_batch(self, capacity: int) -> int:
        """How many samples fit into ``capacity`` bytes at once; 0 when not even one does."""
        return max((capacity - self.fixed) // max(self.sample, 1), 0)


@attrs.frozen
class Plan:
    """Parts by name (``head``, ``layer``, ``tail``; ``denoiser``, ``decoder``, ``encoder``, ``reward``) and jobs by
    name: ``value``, ``tweedie`` (from the latent), ``tweedie_given`` (the sampler has just run the denoiser) and
    ``monte_carlo``, one latent each; ``search``; ``cache`` and ``epoch`` of stage 2.

    ``heads[i]`` is the cost of a head at every cut. ``passes`` denoiser passes make a guided step.
    """

    backbone: str
    reward: str
    dtype: str
    resolution: int
    interface: Interface
    passes: int
    settings: PlanSettings
    parts: dict[str, Cost]
    heads: tuple[Cost, ...]
    jobs: dict[str, Need]

    def fits(self, gpu_memory: float) -> dict[str, int]:
        """The largest batch of every job on a device of so many gigabytes (of 10^9 bytes); 0 where it does not fit.

        Raises :class:`ConfigError` for a size that is not positive.
        """
        if not gpu_memory > 0:
            raise ConfigError(f"gpu memory is {gpu_memory:g} GB; give a positive number of gigabytes, such as 24.")
        return {name: need.largest_batch(int(gpu_memory * GIGABYTE)) for name, need in self.jobs.items()}

    def report(self, gpu_memory: float | None = None) -> dict[str, Any]:
        """JSON-able: everything above, every job with its ``memory``, and ``fits`` for a device of that size."""
        jobs = {name: {**attrs.asdict(need), "memory": need.memory} for name, need in self.jobs.items()}
        found = {**attrs.asdict(self, recurse=True), "jobs": jobs}
        return found if gpu_memory is None else {**found, "gpu_memory": gpu_memory, "fits": self.fits(gpu_memory)}


def plan(backbone: str | BackboneRecord, reward: str | RewardRecord, **settings: Any) -> Plan:
    """Meter a pair at full size; ``settings`` are the fields of :class:`PlanSettings`.

    Raises ``UnknownNameError``, ``PluginLoadError`` (a missing package), :class:`ConfigError` for an unknown setting or
    a record without its architecture, :class:`SliceError` for a resolution or an interface that does not exist.
    """
    names = registry()
    left = names.backbone(backbone) if isinstance(backbone, str) else backbone
    right = names.reward(reward) if isinstance(reward, str) else reward
    try:
        chosen = PlanSettings(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"plan: {error}.") from error
    return plan_networks(build_geometry(left), build_geometry(right), chosen)


def plan_networks(backbone: Backbone, reward: Reward, settings: PlanSettings) -> Plan:
    """As :func:`plan`, of networks on the meta device that carry their records; the backbone's VAE is moved there."""
    left, right = MeteredBackbone.of(backbone, settings.resolution), MeteredReward.of(reward)
    interface = Interface(max(backbone.depth // 2, 1) if settings.cut is None else settings.cut, settings.block)
    checked_taps(backbone, settings.taps, backbone.depth)
    joined = MeteredValue.of(left, right, interface, settings.taps)
    parts = {
        "head": left.heads[interface.i], "layer": joined.layer, "tail": joined.tail,
        "denoiser": left.whole, "decoder": left.decoder, "encoder": left.encoder, "reward": right.whole,
    }  # fmt: skip
    jobs = {
        "value": Need(joined.value.flops, joined.value.bytes + right.whole.bytes, joined.value.activations, 1),
        **_rivals(parts, backbone.guided_passes, settings),
        "search": _search(left, right, settings),
        "cache": _cache(parts, settings),
        "epoch": _epoch(parts, joined.training, settings),
    }
    side = left.latents.latents.shape[-1] * backbone.latent_factor
    names = (backbone.record.name, reward.record.name, backbone.record.dtype)
    return Plan(*names, side, interface, backbone.guided_passes, settings, parts, left.heads, jobs)


def _rivals(parts: Mapping[str, Cost], passes: int, settings: PlanSettings) -> dict[str, Need]:
    """What the same number costs without a value model. Rollouts run one after another."""
    denoiser, decoder, reward = parts["denoiser"], parts["decoder"], parts["reward"]
    weights = denoiser.bytes + decoder.bytes + reward.bytes
    judged = decoder.flops + reward.flops
    peak = max(decoder.activations, reward.activations)
    whole = max(passes * denoiser.activations, peak)
    step = passes * denoiser.flops
    return {
        "tweedie": Need(step + judged, weights, whole, 1),
        "tweedie_given": Need(judged, decoder.bytes + reward.bytes, peak, 1),
        "monte_carlo": Need(settings.rollouts * (settings.steps * step + judged), weights, whole, 1),
    }


def _search(left: MeteredBackbone, right: MeteredReward, settings: PlanSettings) -> Need:
    """Every cut against the first reward blocks: a pass a probe to fit, and on every fourth all tails to judge by."""
    blocks = range(1, min(DEEPEST_BLOCK, right.reward.depth) + 1)
    cells, targets = right.reward.grid_size**2, right.width * len(blocks)
    grids = [left.read_at(cut, settings.taps) for cut in range(1, len(left.grids))]
    layers = {grid: layer_cost(grid, right) for grid in set(grids)}
    width = as_dtype(left.backbone.record.dtype).itemsize
    fit, solve, judge = right.starts[blocks[-1] - 1].flops, 0, right.whole.flops
    kept = features = 0
    for grid in grids:
        channels, layer = grid[0], layers[grid]
        fit += 2 * cells * channels * (channels + targets)
        solve += 4 * channels**2 * targets + 2 * channels * targets
        judge += sum(layer.flops + right.tail_flops(j) for j in blocks)
        # in float64 the sums and the map solved from them; a layer for every pair
        kept += 8 * channels * (channels + 2 * targets) + layer.bytes * len(blocks)
        features += math.prod(grid) * width
    held = settings.probes // JUDGED_EVERY
    flops = settings.probes * (left.encoder.flops + left.heads[-1].flops) + solve
    flops += (settings.probes - held) * fit + held * judge
    fixed = left.whole.bytes + left.encoder.bytes + right.whole.bytes + kept
    passes = max(left.heads[-1].activations, right.whole.activations)
    return Need(flops, fixed, max(left.encoder.activations, features + passes), settings.probe_batch)


def _cache(parts: Mapping[str, Cost], settings: PlanSettings) -> Need:
    """Latents and targets of every image, once."""
    encoder, reward = parts["encoder"], parts["reward"]
    weights = parts["denoiser"].bytes + encoder.bytes + reward.bytes
    flops = settings.images * (encoder.flops + reward.flops)
    return Need(flops, weights, max(encoder.activations, reward.activations), settings.cache_batch)


def _epoch(parts: Mapping[str, Cost], training: Cost, settings: PlanSettings) -> Need:
    """Once through the cached images; the clean networks stay where they are."""
    weights = parts["denoiser"].bytes + parts["encoder"].bytes + parts["reward"].bytes + ADAM * training.bytes
    peak = max(parts["head"].activations, training.activations)
    return Need(settings.images * training.flops, weights, peak, settings.batch)
