"""What methods share that regress from an anchor ``z_tau``, the latent where a rollout stopped."""

from __future__ import annotations

import torch
from torch import Tensor

from stitchvm.core import Prediction, TrainProblem, Update, spread


def levels_above(problem: TrainProblem, update: Update, samples: int, stop: int, count: int | None) -> Tensor:
    """``[P * samples, levels]``: noise levels of the sampler above the stop; ``count`` of each sample's own, or all."""
    levels = problem.sigmas[:stop].cpu()
    seeds = problem.seeds(update, samples, 2)
    if count is None or count >= stop:
        return levels.expand(len(seeds), -1)
    chosen = [torch.randperm(stop, generator=torch.Generator().manual_seed(int(seed)))[:count] for seed in seeds]
    return levels[torch.stack(chosen)]


def noised_again(problem: TrainProblem, anchor: Tensor, tau: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
    """Latents at ``sigma [B]`` of anchors ``[B, C, h, w]`` at ``tau [B]``, each with the noise of its seed."""
    weight, std = problem.reference.path.transfer(tau, sigma)
    return spread(weight, anchor) * anchor + spread(std, anchor) * problem.noise(seeds)


def velocity_errors(prediction: Prediction, errors: Tensor, tau: Tensor) -> Tensor:
    """``[B]``: mean squared errors of the velocity from the ``errors`` of the anchor that a prediction expects.

    An anchor is linear in the velocity; this divides by the factor.
    """
    path, sigma = prediction.path, prediction.sigma
    low, high = path.alpha(tau), path.alpha(sigma)
    factor = low * sigma - high.square() / low * tau.square() / sigma
    return errors.square().flatten(1).mean(1) / factor.square()
