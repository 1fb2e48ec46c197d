"""Layers that read earlier cuts beside their own: features as in the whole network, one least squares over all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import families
from analytic import GaussianBackbone, LinearReward
from stitchvm import core
from stitchvm.core import artefact
from stitchvm.core.alignment.given import estimator_identity
from stitchvm.core.images import open_images
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from stitchvm.core.stitching.searching import ProbeStream

BUILT = {
    "mmdit": (families.mmdit, families.mmdit_input),
    "flux": (families.flux, families.flux_input),
    "unet": (families.unet, families.unet_input),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_tapped_head_hands_out_what_the_whole_network_has_there(name: str) -> None:
    """Against one pass over all blocks; coarser features are drawn out to the finest ones' size."""
    build, example = BUILT[name]
    network = build()
    x, condition = example(network)
    grids = dict(network.features(x, condition))
    taps, cut = (0, network.depth // 2, network.depth - 1), network.depth
    size = max(grids[k].shape[-2:] for k in (*taps, cut))
    expected = torch.cat([
        grids[k] if grids[k].shape[-2:] == size
        else F.interpolate(grids[k], size=size, mode="bilinear", align_corners=False, antialias=True)
        for k in (*taps, cut)
    ], dim=1)  # fmt: skip
    found, state = core.Head(network, cut, reversed(taps))(x, condition, return_state=True)
    assert torch.equal(found, expected)
    resumed, whole = network.resume(state, cut), network.resume(network.head(x, condition, cut), cut)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize(
    ("taps", "words"), [((3,), "tap 3 is not before the cut at 3"), ((-1,), "out of range"), ((99,), "out of range")]
)
def test_a_tap_that_is_not_before_the_cut_is_one_clear_error(taps: tuple[int, ...], words: str) -> None:
    with pytest.raises(core.SliceError, match=words):
        core.Head(families.mmdit(), 3, taps)


def images(count: int) -> list[Tensor]:
    backbone = GaussianBackbone()
    return list(backbone.decode_latents(backbone.draw(count, torch.Generator().manual_seed(1))))


def test_the_search_fits_all_that_a_layer_reads_together() -> None:
    """The streamed fit at cut 3 with taps 0 and 1 equals one lstsq over the three cuts' features, cached."""
    backbone, reward, pictures = GaussianBackbone(), LinearReward(), images(64)
    found = core.search(
        backbone, reward, images=pictures, blocks=(1,), taps=(1, 0), probes=64, progress=False, criterion="mse"
    )
    stream = ProbeStream(backbone, {"x": reward}, open_images(pictures), (0, 1, 3), 64, None, 8, 0, False)
    sources, targets = [], []
    for probe in stream.batches(held=False):
        columns = [probe.features[cut] for cut in (0, 1, 3)]
        sources.append(torch.cat(columns, 1).permute(0, 2, 3, 1).flatten(0, 2))
        targets.append(reward.grid(reward.head(probe.pixels["x"], None, 0)).permute(0, 2, 3, 1).flatten(0, 2))
    source, target = torch.cat(sources).double(), torch.cat(targets).double()
    design = torch.cat([source, torch.ones(len(source), 1, dtype=torch.float64)], 1)
    best = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert found.loss[3, 1] == pytest.approx(float((best - target).square().mean()), rel=1e-6)
    assert found.report()["taps"] == [0, 1]


def test_a_layer_reads_only_the_taps_before_its_cut() -> None:
    """No tap after it: a cut at 1 is judged as without them."""
    settings = {"images": images(64), "blocks": (1,), "probes": 64, "progress": False, "criterion": "mse"}
    plain, tapped = (core.search(GaussianBackbone(), LinearReward(), taps=taps, **settings) for taps in ((), (1, 2)))
    assert tapped.loss[1, 1] == plain.loss[1, 1]
    assert tapped.maps[3].weight.shape[1] == sum(plain.maps[cut].weight.shape[1] for cut in (1, 2, 3))


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[core.StitchedValue, Path]:
    """A value model of the registry's twins with two taps (and one at the cut itself), and where it was saved."""
    backbone = core.build_twin(core.registry().backbone("sd3.5-medium"))
    reward = core.build_twin(core.registry().reward("clip-vit-l-14-336"))
    side, draw = backbone.native_resolution, torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("tapped")
    value = core.stitch(
        backbone, reward, images=list(torch.rand(8, 3, side, side, generator=draw)), out=folder, cuts=(3,), blocks=(1,),
        taps=(1, 2, 3), probes=8, recipe=FinetuneSettings(steps=2, batch_size=4), progress=False,
    )  # fmt: skip
    return value, folder


def test_an_artefact_keeps_its_taps(tapped: tuple[core.StitchedValue, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    value, folder = tapped
    twin = core.build_twin(core.registry().backbone("sd3.5-medium"))
    monkeypatch.setattr(artefact, "load_reward", lambda name, **_: value.reward(name))
    again = core.StitchedValue.from_pretrained(folder, backbone=twin)
    x, _ = value.head.part.example(2)
    latents = torch.randn(x.latents.shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = value(latents, 0.4, ["a"])
    assert value.head.taps == again.head.taps == (1, 2)
    assert torch.equal(again(latents, 0.4, ["a"]), found)
    assert estimator_identity(core.Stitched(again))["taps"] == [1, 2]
    assert "blocks 1, 2 tapped" in (folder / "README.md").read_text()
    (gradient,) = torch.autograd.grad(found.sum(), latents)
    assert gradient.abs().sum() > 0


def test_every_tap_reaches_the_value(tapped: tuple[core.StitchedValue, Path]) -> None:
    """The layer's columns of each cut matter: without any one of them the value is another."""
    value, _ = tapped
    x, _ = value.head.part.example(2)
    latents = torch.randn(x.latents.shape, generator=torch.Generator().manual_seed(1))
    (branch,) = value.branches
    weight = branch.layer.linear.weight
    whole, width = value(latents, 0.4, ["a"]), weight.shape[1] // 3
    for part in range(3):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, part * width : (part + 1) * width] = 0
            assert not torch.equal(value(latents, 0.4, ["a"]), whole)
            weight.copy_(kept)
