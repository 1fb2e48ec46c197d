"""Pipeline calls with callbacks that note what happens, and a value that can be written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F

from analytic import LinearReward
from pipelines import KINDS, open_pipeline, write_pipeline
from stitchvm.core import LATENT, Backbone, Head, ResamplingCallback, StitchedValue, Tail, backbone_from, name_of
from stitchvm.core.branch import Branch
from stitchvm.core.layer import StitchingLayer

EACH = pytest.mark.parametrize("kind", KINDS)
WEIGHTS = (1.0, -2.0, 0.5)
STEPS, SIZE = 5, (16, 24)
HEIGHT_WIDTH = {"height": SIZE[0], "width": SIZE[1]}
SAME = ((DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}), (EulerDiscreteScheduler, {}))
"""Two schedulers that take the same steps in two scales."""


def open_all(folders: pytest.TempPathFactory) -> dict[str, Any]:
    """A small pipeline of every kind, written and opened."""
    opened = {}
    for kind in KINDS:
        folder = folders.mktemp(kind)
        write_pipeline(folder, kind)
        opened[kind] = open_pipeline(folder, kind)
    return opened


def with_scheduler(pipe: Any, cls: Any, **settings: Any) -> Any:
    other = copy.copy(pipe)
    other.__dict__ = {**pipe.__dict__}
    other.scheduler = cls.from_config(pipe.scheduler.config, **settings)
    return other


def linear_value(pipe: Any, weights: tuple[float, ...] = WEIGHTS) -> StitchedValue:
    """The value that :func:`by_hand` writes out."""
    backbone, reward = backbone_from(pipe), LinearReward(weights, side=8)
    layer = StitchingLayer(4, 6, 8)
    layer.load_map(torch.eye(6, 4), torch.zeros(6))
    branch = Branch(layer, Tail(reward, 1, torch.zeros(1, 6)))
    name = name_of(reward)
    return StitchedValue(Head(backbone, LATENT), {name: branch}, backbone.null_condition(), rewards={name: reward})


def stitched(backbone: Backbone, *, prompted: bool) -> StitchedValue:
    """A value that reads the features after the first block."""
    torch.manual_seed(4)
    reward = LinearReward(WEIGHTS, side=8)
    layer = StitchingLayer(backbone.feature_info()[1].num_chs, 6, 8)
    branch = Branch(layer, Tail(reward, 1, torch.zeros(1, 6)))
    name = name_of(reward)
    return StitchedValue(
        Head(backbone, 1), {name: branch}, backbone.null_condition(), rewards={name: reward}, prompted=prompted
    )


def by_hand(latents: Tensor) -> Tensor:
    """``mean over 8 x 8 resampled positions of WEIGHTS . z``, of the first three channels ``[B, 4, h, w]``."""
    small = F.interpolate(latents[:, :3], size=(8, 8), mode="bilinear", antialias=True)
    return (torch.tensor(WEIGHTS)[:, None, None] * small).sum(1).mean((1, 2))


def gradient() -> Tensor:
    """Of :func:`by_hand`, the same everywhere: ``[1, 4, 8, 12]``."""
    latents = torch.zeros(1, 4, 8, 12, requires_grad=True)
    (found,) = torch.autograd.grad(by_hand(latents).sum(), latents)
    return found


def noise(kind: str, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(5)).to(dtype)
    return diffusers.FluxPipeline._pack_latents(drawn, *drawn.shape) if kind == "flux" else drawn


class Recorder:
    """Notes the latents after every step, before and after another callback acts."""

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.before, self.after = inner, [], []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.before.append(tensors["latents"].clone())
        if self.inner is not None:
            tensors = self.inner(pipe, step, timestep, tensors)
        self.after.append(tensors["latents"].clone())
        return tensors


def run(pipe: Any, kind: str, callback: Any = None, prompt: Any = "a cat", batch: int = 1, **settings: Any) -> Tensor:
    """The clean latents of the pipeline's own call."""
    hook = {} if callback is None else {
        "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]
    }  # fmt: skip
    asked = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": noise(kind, batch), **settings}
    return pipe(prompt, output_type="latent", **HEIGHT_WIDTH, **asked, **hook, **KINDS[kind].call).images


def levels(pipe: Any, kind: str) -> list[float]:
    """The noise levels of the last call, from the scheduler's own numbers."""
    scheduler = pipe.scheduler
    if kind in ("sd3", "flux"):
        return [float(sigma) for sigma in scheduler.sigmas]
    if isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler):
        return [float(own / (1 + own**2) ** 0.5) for own in scheduler.sigmas.double()]
    visited = [(1 - float(scheduler.alphas_cumprod[int(t)])) ** 0.5 for t in scheduler.timesteps]
    return [*visited, 0.0]


def as_grid(kind: str, latents: Tensor) -> Tensor:
    return diffusers.FluxPipeline._unpack_latents(latents, *SIZE, 2) if kind == "flux" else latents


def resampling(pipe: Any, **settings: Any) -> ResamplingCallback:
    settings = {"window": (0.4, 0.8), "interval": 2, **settings}
    return ResamplingCallback(linear_value(pipe), "a cat", **HEIGHT_WIDTH, **settings)
