"""Every registered backbone is stitched, trained and read end to end, as its twin: no pair is only a name."""

from __future__ import annotations

import pytest
import torch

from stitchvm import core
from stitchvm.core import Backbone
from stitchvm.core.examples import GenerationSettings
from stitchvm.core.finetune import FinetuneSettings

BACKBONES = ["sd3-medium", "sd3.5-medium", "sd3.5-large", "flux-dev", "flux-schnell", "sd1.5", "sdxl"]


def _value(backbone: Backbone, side: int) -> core.StitchedValue:
    """A value model after the whole of stage 1 and two steps of stage 2, with samples of the backbone's own."""
    pictures = list(torch.rand(12, 3, side, side, generator=torch.Generator().manual_seed(0)))
    return core.stitch(
        backbone,
        core.build_twin(core.registry().reward("clip-vit-l-14")),
        images=pictures,
        prompts=["a cat", "a dog"],
        recipe=FinetuneSettings(steps=2, batch_size=4, generated=0.5, warmup_steps=0),
        blocks=(1, 2),
        probes=8,
        count=8,
        samples=4,
        generation=GenerationSettings(steps=2),
        batch=4,
        progress=False,
    )


def _check(value: core.StitchedValue, backbone: Backbone) -> None:
    """The value of every sample at a level of its own is finite, and moves with its own latent."""
    side = backbone.native_resolution // backbone.latent_factor
    latents = torch.randn(3, backbone.latent_channels, side, side, requires_grad=True)
    scores = value(latents, torch.tensor([0.1, 0.5, 1.0]), ["a cat", "a dog", "a cat"])
    assert scores.shape == (3,)
    assert bool(scores.isfinite().all())
    scores.sum().backward()
    assert bool((latents.grad.flatten(1).abs().sum(1) > 0).all())


def test_every_backbone_of_the_registry_is_here():
    built_in = {r.name for r in core.registry().backbones.values() if r.source and r.source.level == "built-in"}
    assert built_in == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_twin_is_stitched_and_read(name):
    backbone = core.build_twin(core.registry().backbone(name))
    _check(_value(backbone, backbone.native_resolution), backbone)
