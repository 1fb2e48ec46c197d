"""Every registered pair, third-party ones included: geometry at full size, and its twins stitched from end to end.

``--backbones a,b`` runs those of some backbones alone, as the jobs of the workflow do.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

import reward_families
from stitchvm import core
from stitchvm.core import Backbone, Reward, artefact
from stitchvm.core.branch import Interface
from stitchvm.core.grids import resample
from stitchvm.core.images import open_images
from stitchvm.core.layer import StitchingLayer
from stitchvm.core.pairing import registered_pairs
from stitchvm.core.planning.metered_networks import META, MeteredBackbone, MeteredReward, MeteredValue, layer_cost
from stitchvm.core.planning.metering import metered
from stitchvm.core.reward import Tail
from stitchvm.core.stitching.batches import Batches
from stitchvm.core.stitching.beginnings import initial_value
from stitchvm.core.stitching.examples import Examples, GenerationSettings
from stitchvm.core.stitching.finetune import finetune
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from stitchvm.core.stitching.run import training_examples
from stitchvm.core.stitching.searching import DEEPEST_BLOCK
from stitchvm.core.stitching.stitch_settings import StitchSettings
from stitchvm.core.value import StitchedValue

RECIPE = FinetuneSettings(steps=4, batch_size=4, learning_rate=3e-5, warmup_steps=0, noise="uniform", generated=0.5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(pair.backbone, pair.reward) for pair in registered_pairs(core.registry())]
    wanted = metafunc.config.getoption("--backbones")
    if wanted is not None:
        chosen = wanted.split(",")
        if missing := sorted(set(chosen) - {backbone for backbone, _ in pairs}):
            raise pytest.UsageError(f"--backbones: {', '.join(missing)} of no registered pair.")
        pairs = [pair for pair in pairs if pair[0] in chosen]
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", pairs, ids=" ".join)


# -- at full size, on the meta device ---------------------------------------------------------------------------------


@functools.cache
def full_backbone(name: str, scale: int = 1) -> MeteredBackbone:
    """At the backbone's own resolution divided by ``scale``."""
    record = core.registry().backbone(name)
    network = core.build_geometry(record) if record.twin else fresh_backbone(name).to_meta()
    return MeteredBackbone.of(network, network.native_resolution // scale)


@functools.cache
def full_reward(name: str) -> MeteredReward:
    record = core.registry().reward(name)
    return MeteredReward.of(core.build_geometry(record) if record.twin else twin_reward(name).to_meta())


@functools.cache
def backbone_grids(name: str) -> tuple[tuple[int, int, int], ...]:
    """As the backbone's own ``feature_info`` has it."""
    backbone = full_backbone(name).backbone
    side = backbone.native_resolution // backbone.latent_factor
    return tuple((at.num_chs, side // at.reduction, side // at.reduction) for at in backbone.feature_info())


def test_geometry_at_full_size(pair):
    """Every interface there is has a layer that joins it, at the backbone's own resolution and at half of it."""
    left, right = full_backbone(pair[0]), full_reward(pair[1])
    backbone, reward = left.backbone, right.reward
    assert all(p.is_meta for p in (*backbone.parameters(), *reward.parameters()))
    assert left.grids == backbone_grids(pair[0])
    half = full_backbone(pair[0], 2)
    assert len(left.grids) == len(half.grids) == backbone.depth + 1
    for grid, smaller in set(zip(left.grids, half.grids, strict=True)):
        assert smaller == (grid[0], grid[1] // 2, grid[2] // 2)
        assert _joined(grid, right) == _joined(smaller, right) == (1, right.width, reward.grid_size, reward.grid_size)


def _joined(grid: tuple[int, int, int], right: MeteredReward) -> tuple[int, ...]:
    """The shape of what a stitching layer makes of a grid, once through the layer and once by resampling it first."""
    with META, torch.no_grad():
        layer, features = StitchingLayer(grid[0], right.width, right.reward.grid_size), torch.zeros(1, *grid)
        shape = layer(features).shape
        assert layer.linear(resample(features, right.reward.grid_size)).shape == shape
    return tuple(shape)


def test_costs_at_full_size(pair):
    """Parameters and FLOPs of head and tail grow from cut to cut and add up to the whole; those of the layer between
    are their formulas at every interface."""
    left, right = full_backbone(pair[0]), full_reward(pair[1])
    for parts, whole in ((left.heads, left.whole), (right.starts, right.whole)):
        for smaller, larger in zip(parts, (*parts[1:], whole), strict=True):
            assert 0 < smaller.parameters <= larger.parameters
            assert 0 < smaller.flops <= larger.flops
    for j, (parameters, flops) in full_tails(pair[1]).items():
        assert flops == right.tail_flops(j)
        assert parameters >= right.whole.parameters - right.starts[j - 1].parameters, "and what entering it needs"
    hidden, cells = max(right.width // 8, 1), right.reward.grid_size**2
    for channels, height, width in set(left.grids):
        layer = layer_cost((channels, height, width), right)
        assert layer.flops == 2 * height * width * channels * right.width + 4 * cells * right.width * hidden
        assert layer.parameters == (channels + 1 + 2 * hidden + 1) * right.width + hidden


@functools.cache
def full_tails(name: str) -> dict[int, tuple[int, int]]:
    """Parameters and FLOPs of the first and the deepest tail that a search tries, run by themselves."""
    right, found = full_reward(name), {}
    for j in (1, min(DEEPEST_BLOCK, right.reward.depth)):
        with META, torch.no_grad():
            tail = Tail(right.reward, j, torch.zeros(right.reward.prefix_count, right.width))
            with metered() as cost:
                tail(torch.zeros(1, right.width, right.reward.grid_size, right.reward.grid_size))
        found[j] = sum(p.numel() for p in tail.parameters()) - tail.prefix.numel(), cost.flops
    return found


# -- twins, from end to end -------------------------------------------------------------------------------------------


# A record without a twin is of weights that its package brings along: a model as small as a twin, read as it is.


def fresh_backbone(name: str) -> Backbone:
    record = core.registry().backbone(name)
    return core.build_twin(record) if record.twin else core.load_backbone(record)


twin_backbone = functools.cache(fresh_backbone)


@functools.cache
def twin_reward(name: str) -> Reward:
    record = core.registry().reward(name)
    return core.build_twin(record) if record.twin else core.load_reward(record)


@functools.cache
def metered_twin(name: str) -> MeteredBackbone:
    """Of a twin of its own: what is not cut, the VAE, goes along to the meta device."""
    return MeteredBackbone.of(fresh_backbone(name).to_meta())


def test_a_value_costs_what_its_parts_do(pair):
    left, right = metered_twin(pair[0]), MeteredReward.of(twin_reward(pair[1]).to_meta())
    value = MeteredValue.of(left, right, Interface(1, 2))
    assert value.tail.flops == right.tail_flops(2)
    assert value.layer == attrs.evolve(layer_cost(left.grids[1], right), activations=0)
    for quantity in ("parameters", "flops"):
        parts = (left.heads[1], value.layer, value.tail)
        assert getattr(value.value, quantity) == sum(getattr(part, quantity) for part in parts)
    assert value.training.flops > left.heads[1].flops + 2 * value.tail.flops


def test_twins_are_stitched_from_end_to_end(pair, tmp_path, monkeypatch):
    """Search; four steps on images and the backbone's own samples; save, load; the value and its gradient."""
    backbone, reward = twin_backbone(pair[0]), twin_reward(pair[1])
    value, examples = _searched(backbone, reward, tmp_path)
    fixed = Batches.of(backbone, *examples, RECIPE)(0)
    monkeypatch.setattr(Batches, "__call__", lambda *_: {name: tensor.clone() for name, tensor in fixed.items()})
    losses = finetune(value, examples[0], RECIPE, samples=examples[1], progress=False)
    assert losses[-1] < losses[0], "on the same data and noise in every step, a descent"
    value.requires_grad_(False)
    condition = reward.condition(reward_families.compared(reward))
    latents = _latents(backbone)
    scores = _read(value, latents, condition)
    monkeypatch.setattr(artefact, "load_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr(artefact, "load_reward", lambda *_, **__: reward)
    value.save_pretrained(tmp_path / "value")
    again = StitchedValue.from_pretrained(tmp_path / "value")
    assert torch.equal(_read(again, latents, condition), scores)


def _searched(
    backbone: Backbone, reward: Reward, work: Path
) -> tuple[StitchedValue, tuple[Examples | None, Examples | None]]:
    """The best of four interfaces before finetuning, and the caches to finetune it on."""
    side = backbone.native_resolution
    source = open_images(list(torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0))))
    result = core.search(
        backbone, reward, images=source.items, cuts=(1, backbone.depth), blocks=(1, 2), probes=8, batch=8,
        resolution=side, progress=False,
    )  # fmt: skip
    assert len(result.loss) == 4
    assert all(math.isfinite(loss) for losses in result.losses.values() for loss in losses.values())
    value = initial_value(backbone, reward, result, result.best)
    settings = StitchSettings(count=4, samples=2, generation=GenerationSettings(steps=2, states=0), batch=4)
    names = {value.names[0]: reward}
    return value, training_examples(
        backbone, names, source, ["a cat", "a dog"], RECIPE, settings, work / "cache", progress=False
    )


def _latents(backbone: Backbone) -> Tensor:
    side = backbone.native_resolution // backbone.latent_factor
    return torch.randn(3, backbone.latent_channels, side, side, generator=torch.Generator().manual_seed(1))


def _read(value: StitchedValue, latents: Tensor, condition: core.Condition) -> Tensor:
    """The value of every latent at a level of its own: finite, and it moves with its own latent."""
    latents = latents.clone().requires_grad_()
    scores = value(latents, torch.tensor([0.1, 0.5, 1.0]), condition)
    assert scores.shape == (3,)
    assert bool(scores.isfinite().all())
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    return scores.detach()
