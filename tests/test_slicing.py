"""What every family must hold: cuts add up to the upstream model, bit for bit, and a part owns only what it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import families
import reward_families
from stitchvm import core
from stitchvm.core import LATENT, Head, Reward, Sliced, SliceError


def _mmdit(**settings: Any) -> tuple[Sliced, Any, Any, Any]:
    backbone = families.mmdit(**settings)
    x, condition = families.mmdit_input(backbone)
    return backbone, x, condition, families.mmdit_upstream(backbone, x, condition)


def _flux(**settings: Any) -> tuple[Sliced, Any, Any, Any]:
    backbone = families.flux(**settings)
    x, condition = families.flux_input(backbone)
    return backbone, x, condition, families.flux_upstream(backbone, x, condition)


def _unet(kind: str = "sd", **settings: Any) -> tuple[Sliced, Any, Any, Any]:
    backbone = families.unet(kind, **settings)
    x, condition = families.unet_input(backbone)
    return backbone, x, condition, families.unet_upstream(backbone, x, condition)


def _clip(vision: dict[str, Any] | None = None, **settings: Any) -> tuple[Sliced, Any, Any, Any]:
    reward = families.clip(vision=vision, **settings)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return reward, pixels, None, reward.net(pixels)


def _reward(make: Callable[[], Reward]) -> tuple[Sliced, Any, Any, Any]:
    reward, pixels = make(), reward_families.pixels()
    return reward, pixels, None, reward.net(pixels)


CASES: dict[str, Callable[[], tuple[Sliced, Any, Any, Any]]] = {
    "mmdit-dual": _mmdit,
    "mmdit-plain": lambda: _mmdit(dual_attention_layers=[], qk_norm=None),
    "mmdit-dual-last": lambda: _mmdit(dual_attention_layers=[3]),
    "flux-guided": _flux,
    "flux-plain": lambda: _flux(guidance_embeds=False),
    "flux-single-only": lambda: _flux(num_layers=0),
    "unet-sd": _unet,
    "unet-xl": lambda: _unet("xl"),
    "unet-no-middle": lambda: _unet(mid_block_type=None, norm_num_groups=4, time_embedding_act_fn="silu"),
    **{f"reward-{name}": lambda make=make: _reward(make) for name, make in reward_families.REWARDS.items()},
    "clip-quickgelu": _clip,
    "clip-gelu": lambda: _clip(quick_gelu=False),
    "clip-average": lambda: _clip({"pool_type": "avg"}),
    "clip-norm-after-pool": lambda: _clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "clip-norm-after-token": lambda: _clip({"final_ln_after_pool": True}),
    "clip-no-ln-pre": lambda: _clip({"no_ln_pre": True, "ls_init_value": 0.3}),
    "clip-patch-dropout": lambda: _clip({"patch_dropout": 0.5}),
    "clip-sincos": lambda: _clip({"pos_embed_type": "sin_cos_2d"}),
}


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Sliced, Any, Any, Any]:
    return CASES[request.param]()


def _final(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.embedding


def test_run_equals_upstream(case, parity):
    network, x, condition, upstream = case
    assert torch.equal(_final(network.exit(network.run(network.stem(x, condition), 0, network.depth))), upstream)
    parity("forward", "whole")


def test_a_family_s_own_reference_is_the_upstream_forward(case, parity):
    network, x, condition, upstream = case
    assert torch.equal(network.upstream(x, condition), upstream)
    parity("upstream()", "whole")


def test_resume_equals_upstream_at_every_cut(case, parity):
    network, x, condition, upstream = case
    for cut in range(network.depth + 1):
        assert torch.equal(_final(network.resume(network.head(x, condition, cut), cut)), upstream), cut
    parity("resume(head)", f"cuts 0-{network.depth}")


def test_head_module_equals_the_whole_at_every_cut(case, parity):
    network, x, condition, _ = case
    grids = dict(network.features(x, condition))
    for cut in range(network.depth + 1):
        assert torch.equal(Head(network, cut)(x, condition), grids[cut]), cut
    parity("head module", f"cuts 0-{network.depth}")


def test_head_owns_nothing_from_after_its_cut(case):
    network, *_ = case
    whole = set(network.net.state_dict())
    sizes = []
    for cut in range(network.depth + 1):
        part = Head(network, cut).part.net
        names = set(part.state_dict())
        assert names <= whole
        later = (*network.block_modules[cut:], *network.exit_modules)
        assert not [n for n in names if any(n == path or n.startswith(path + ".") for path in later)], cut
        prefixes = network.tensor_prefixes(0, cut)
        assert names == {n for n in whole if any(n == p or n.startswith(p + ".") for p in prefixes)}
        sizes.append(sum(p.numel() for p in part.parameters()))
    assert sizes == sorted(set(sizes))


def test_latent_cut_owns_and_reads_nothing(case):
    network, x, condition, _ = case
    head = Head(network, LATENT)
    assert not list(head.parameters())
    assert network.tensor_prefixes(0, LATENT) == ()
    assert torch.equal(head(x, condition), network.input_grid(x))


def test_pruning_leaves_the_whole_as_it_was(case):
    network, x, condition, upstream = case
    Head(network, 0)
    network.prune(network.depth, network.depth, enter=True)
    assert torch.equal(_final(network.resume(network.head(x, condition, 0), 0)), upstream)


def test_feature_info_is_what_the_cuts_really_give(case):
    network, x, condition, _ = case
    info = network.feature_info()
    assert [entry.name for entry in info] == ["stem", *network.block_modules]
    inputs = [(x, condition), network.example(2)]
    for given, text in inputs:
        side = network.input_grid(given).shape[-1]
        for entry, (cut, grid) in zip(info, network.features(given, text), strict=True):
            assert (entry.cut, entry.num_chs, entry.reduction) == (cut, grid.shape[1], side // grid.shape[-1])


def test_feature_info_of_a_pruned_network_is_refused(case):
    network, *_ = case
    with pytest.raises(SliceError, match="pruned"):
        network.prune(0, 1).feature_info()


def test_frozen_in_eval_mode(case):
    network, *_ = case
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_a_cut_that_does_not_exist(case):
    network, x, condition, _ = case
    for cut in (LATENT - 1, network.depth + 1):
        with pytest.raises(SliceError, match=f"cut {cut} is out of range"):
            network.head(x, condition, cut)


def test_gradient_checkpointing_changes_nothing(case):
    network, x, condition, _ = case
    results = []
    for switch in (False, True):
        network.gradient_checkpointing = switch
        given, leaf = _leaf(x)
        output = _final(network.resume(network.head(given, condition, 0), 0))
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    network.gradient_checkpointing = False
    (plain, gradient), (checkpointed, same) = results
    assert torch.equal(plain, checkpointed)
    assert torch.equal(gradient, same)
    assert gradient.abs().sum() > 0


def test_gradient_reaches_the_input_from_every_cut(case):
    network, x, condition, _ = case
    for cut in range(network.depth + 1):
        given, leaf = _leaf(x)
        Head(network, cut)(given, condition).square().sum().backward()
        assert bool((leaf.grad.flatten(1).abs().sum(1) > 0).all()), cut


def _leaf(x: Any) -> tuple[Any, torch.Tensor]:
    """The input with a tensor that collects its gradient."""
    if isinstance(x, torch.Tensor):
        leaf = x.clone().requires_grad_()
        return leaf, leaf
    leaf = x.latents.clone().requires_grad_()
    return core.NoisyLatent(leaf, x.sigma), leaf


def test_every_sample_is_on_its_own(case):
    network, x, condition, upstream = case
    order = torch.tensor([2, 0, 1])
    if isinstance(x, torch.Tensor):
        shuffled, text = x[order], condition
    else:
        shuffled, text = core.NoisyLatent(x.latents[order], x.sigma[order]), condition.index(order)
    output = _final(network.resume(network.head(shuffled, text, 0), 0))
    torch.testing.assert_close(output, upstream[order], rtol=1e-5, atol=1e-5)


SD15_GRIDS = [
    *[(320, 1)] * 3, (320, 2), *[(640, 2)] * 2, (640, 4), *[(1280, 4)] * 2, *[(1280, 8)] * 8,
    *[(1280, 4)] * 4, *[(1280, 2)], *[(640, 2)] * 3, *[(640, 1)], *[(320, 1)] * 3,
]  # fmt: skip
SDXL_GRIDS = [
    *[(320, 1)] * 3, (320, 2), *[(640, 2)] * 2, (640, 4), *[(1280, 4)] * 7,
    *[(1280, 2)], *[(640, 2)] * 3, *[(640, 1)], *[(320, 1)] * 3,
]  # fmt: skip

PUBLISHED: dict[str, tuple[int, Any, int | None, float]] = {
    "sd3-medium": (24, 1536, 2, 2_028_328_000),
    "sd3.5-medium": (24, 1536, 2, 2.243e9),
    "sd3.5-large": (38, 2432, 2, 8.057e9),
    "flux-dev": (57, 3072, 2, 11_901_408_320),
    "flux-schnell": (57, 3072, 2, 11_891_178_560),
    "sd1.5": (28, SD15_GRIDS, None, 859_520_964),
    "sdxl": (21, SDXL_GRIDS, None, 2_567_463_684),
    "clip-vit-l-14-336": (24, 1024, 14, 304.3e6),
    "clip-vit-l-14": (24, 1024, 14, 303_966_208),
    "dfn-clip-vit-h-14-378": (32, 1280, 14, 632_682_240),
    "pickscore": (32, 1280, 14, 632_076_800),
    "siglip2-so400m-14-378": (27, 1152, 14, 428_225_600),
    "hpsv2": (32, 1280, 14, 632_076_800),
    "hpsv2.1": (32, 1280, 14, 632_076_800),
    "aesthetic": (24, 1024, 14, 303_966_208),
    "dinov2-vit-l-14": (24, 1024, 14, 304_367_616),
    "dinov2-vit-l-14-reg4": (24, 1024, 14, 304_370_688),
}
"""Depth, width, reduction and parameters: 2.5 B and 8.1 B with their VAE, 304 M for the ViT-L/14 tower; UNets to the
last one. A network whose width and reduction vary from cut to cut has a list of both, cut by cut, in the width's place.
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_geometry_at_full_size(name):
    """On the meta device, with no weights and no memory, the registry's figures build the model that was published."""
    registry = core.registry()
    network = core.build_geometry(registry.backbone(name) if name in registry.backbones else registry.reward(name))
    assert all(p.is_meta for p in network.parameters())
    info = network.feature_info()
    depth, width, reduction, parameters = PUBLISHED[name]
    assert (network.depth, len(info)) == (depth, depth + 1)
    grids = width if isinstance(width, list) else [(width, reduction)] * len(info)
    assert [(entry.num_chs, entry.reduction) for entry in info] == grids
    exact = isinstance(parameters, int)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0 if exact else 1e-3)


def test_every_built_in_model_has_its_geometry_tested():
    registry = core.registry()
    records = (*registry.backbones.values(), *registry.rewards.values())
    assert {r.name for r in records if r.source is not None and r.source.level == "built-in"} == set(PUBLISHED)


def test_twins_are_small_and_the_same_every_time():
    registry = core.registry()
    for name in PUBLISHED:
        record = registry.backbone(name) if name in registry.backbones else registry.reward(name)
        state = torch.random.get_rng_state()
        first, same = (core.build_twin(record).state_dict() for _ in range(2))
        assert torch.equal(state, torch.random.get_rng_state())
        assert sum(t.numel() for t in first.values()) < 200_000
        assert all(torch.equal(first[n], same[n]) for n in first)
