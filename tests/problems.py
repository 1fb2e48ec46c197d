"""Alignment problems in the analytic world, and what a method's particles say of the distribution they follow."""

from __future__ import annotations

import torch

from analytic import GaussianBackbone, MomentReward
from stitchvm.core import AlignProblem, Condition, Denoiser, Estimator, Particles, Prompted
from stitchvm.core.alignment.particles import initial_noise, step_generators
from stitchvm.core.estimators import clean_reward


def problem(
    backbone: GaussianBackbone,
    reward: MomentReward,
    estimator: Estimator | None,
    *,
    prompts: int = 1,
    particles: int = 4,
    steps: int = 12,
    seed: int = 0,
    batch: int = 4096,
    guidance_scale: float = 1.0,
) -> AlignProblem:
    numbers, side = range(prompts), backbone.native_resolution
    condition = backbone.encode_prompts([""] * prompts)
    denoiser = Denoiser(backbone, condition, backbone.null_condition(), guidance_scale)
    return AlignProblem(
        Prompted(denoiser, Condition()),
        initial_noise(seed, numbers, particles, (backbone.latent_channels, side, side)),
        backbone.sigmas(steps, (side, side)),
        estimator,
        lambda latents, context: clean_reward(latents, context, reward),
        step_generators(seed, numbers),
        batch,
    )


def weighted_moments(found: Particles) -> tuple[torch.Tensor, torch.Tensor]:
    """Each prompt's weighted mean and second moment of the latents, averaged over positions: ``[P, C]`` twice."""
    weights = found.weights[:, :, None]
    first, second = (found.latents**power for power in (1, 2))
    return (weights * first.mean((3, 4))).sum(1), (weights * second.mean((3, 4))).sum(1)
