"""Training problems small enough for a test: tiny networks with a little LoRA, and the plainest estimators."""

from __future__ import annotations

from typing import Any

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


def problem(
    backbone: Backbone | None = None, estimator: Estimator | None = None, *, moved: float = 0.0, **fields: Any
) -> TrainProblem:
    """Two prompts on a tiny SD 3, or another backbone; ``moved`` gives the LoRA other numbers than it, and the
    old policy, begin with."""
    network = families.mmdit() if backbone is None else backbone
    policy = Policy.of(network, LORA)
    fields.setdefault("old", policy.another())
    if moved:
        with torch.no_grad():
            for name, parameter in policy.parameters.items():
                draw = torch.Generator().manual_seed(len(name))
                parameter.add_(moved * torch.randn(parameter.shape, generator=draw))
    side = network.native_resolution // network.latent_factor
    return TrainProblem(
        policy, network, estimator or Brightness(), network.encode_prompts(["a red ball", "a blue box"]), Condition(),
        network.null_condition(), network.sigmas(STEPS, (side, side)), (network.latent_channels, side, side), **fields,
    )  # fmt: skip


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
