"""This package beside StitchVM: found as a plugin, and stitched to built-in models in both directions."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from stitchvm import core
from stitchvm.core import artefact
from stitchvm.core.stitching.finetune_settings import FinetuneSettings

DISTRIBUTION = "stitchvm-pixart-example"
PAIRS = [
    ("pixart-sigma-1024", "clip-vit-l-14"),
    ("sd3.5-medium", "convnext-golden-retriever"),
    ("pixart-sigma-1024", "convnext-golden-retriever"),
]


def test_it_is_installed_as_a_distribution_of_its_own_and_breaks_nothing():
    points = importlib.metadata.distribution(DISTRIBUTION).entry_points
    assert [(point.group, point.value) for point in points] == [("stitchvm", "stitchvm_pixart")]
    registry = core.registry()
    assert [problem for problem in registry.problems() if problem.distribution == DISTRIBUTION] == []
    own = {record.name for record in registry.list() if record.source.distribution == DISTRIBUTION}
    assert own == {"pixart-sigma-1024", "convnext-golden-retriever"}


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_stitched_with_built_in_models(pair, tmp_path, monkeypatch):
    """Search, finetune, save, load; a value with a gradient."""
    backbone, reward = (
        core.build_twin(core.registry().backbone(pair[0])),
        core.build_twin(core.registry().reward(pair[1])),
    )
    monkeypatch.setattr(artefact, "load_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr(artefact, "load_reward", lambda *_, **__: reward)
    side = backbone.native_resolution
    pictures = list(torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0)))
    recipe = FinetuneSettings(steps=3, batch_size=4, warmup_steps=0, learning_rate=1e-3)
    value = core.stitch(
        backbone, reward, images=pictures, out=tmp_path / "value", recipe=recipe, cuts=(1, 2), probes=8, batch=4,
        progress=False,
    )  # fmt: skip
    condition = None if reward.condition_kind == "nothing" else ["a dog", "a cat"]
    latent = side // backbone.latent_factor
    latents = torch.randn(2, 4, latent, latent, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scores = value(latents, torch.tensor([0.2, 0.9]), condition)
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    again = core.StitchedValue.from_pretrained(tmp_path / "value")
    assert torch.equal(again(latents, torch.tensor([0.2, 0.9]), condition), scores)
