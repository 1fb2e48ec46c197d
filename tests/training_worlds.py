"""Training problems small enough for a test: tiny networks with a little LoRA, and the plainest estimators."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

import families
from stitchvm.core import (
    Backbone,
    Condition,
    Estimator,
    Experience,
    LoraSettings,
    NoisyLatent,
    Policy,
    Prediction,
    Prompted,
    Rows,
    TrainProblem,
    Update,
)

LORA = LoraSettings(rank=2, alpha=4)
STEPS = 5
UPDATE = Update(0, (0, 1), (0, 1))


@attrs.frozen(eq=False)
class Brightness:
    """A value that reads the latents alone: their mean, through a curve so that its gradient is not constant."""

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        return torch.tanh(latents.flatten(1).mean(1))


@attrs.frozen(eq=False)
class Foreseen(Brightness):
    """The brightness that the denoiser expects in the end: what it is depends on whose network that is."""

    through_denoiser: ClassVar[bool] = True

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        found = prediction or context.denoiser(latents, sigma)
        return super().__call__(found.z0, sigma, context)


@attrs.frozen(eq=False)
class Gapped(Brightness):
    """No number for the samples at these positions of a batch."""

    gaps: tuple[int, ...]

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        value = super().__call__(latents, sigma, context)
        value[list(self.gaps)] = torch.nan
        return value


def problem(
    backbone: Backbone | None = None, estimator: Estimator | None = None, *, moved: float = 0.0, **fields: Any
) -> TrainProblem:
    """Two prompts on a tiny SD 3, or another backbone; ``moved`` gives the LoRA and the old policy's each other numbers
    than they begin with, so that policy, old policy and frozen backbone are three networks."""
    network = families.mmdit() if backbone is None else backbone
    policy = Policy.of(network, LORA)
    fields.setdefault("old", policy.another())
    for trained, first in ((policy, 0), (fields["old"], 1000)):
        _move(trained, moved, first)
    side = network.native_resolution // network.latent_factor
    return TrainProblem(
        policy, network, estimator or Brightness(), network.encode_prompts(["a red ball", "a blue box"]), Condition(),
        network.null_condition(), network.sigmas(STEPS, (side, side)), (network.latent_channels, side, side), **fields,
    )  # fmt: skip


@torch.no_grad()
def _move(policy: Policy, size: float, first_seed: int) -> None:
    for name, parameter in policy.parameters.items():
        draw = torch.Generator().manual_seed(first_seed + len(name))
        parameter.add_(size * torch.randn(parameter.shape, generator=draw))


def reached_by(task: TrainProblem, backbone: Backbone, noise: Tensor, owners: Tensor, stop: int) -> Tensor:
    """Latents after the first ``stop`` steps of Euler's method over this network's own output, without gradient."""
    z, condition = noise, task.conditions.index(owners)
    with torch.no_grad():
        for sigma, following in pairwise(task.sigmas[: stop + 1]):
            z = z + (following - sigma) * backbone.upstream(NoisyLatent(z, sigma.expand(len(z))), condition)
    return z


def gradients(problem: TrainProblem, losses: Tensor) -> dict[str, Tensor]:
    """Of the mean loss in every trained parameter."""
    found = torch.autograd.grad(losses.mean(), list(problem.policy.parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(problem.policy.parameters.items(), found, strict=True)
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Two sets of gradients agree, and are not all zero."""
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 0
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=tolerance * scale)


def rows_of(found: Experience, size: int = 64) -> Rows:
    """All rows as one batch."""
    (rows,) = found.batches(size, torch.device("cpu"))
    return rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
