"""The bookkeeping of sequential Monte Carlo: weights, ancestry and resampling of particles under way."""

from __future__ import annotations

from typing import Self

import attrs
import torch
from torch import Tensor

from ..errors import NonFiniteError
from .particles import Particles, Resampling
from .problem import AlignProblem
from .resampling import draw_ancestors


@attrs.define(eq=False)
class Swarm:
    """Flat ``latents [P * N, C, h, w]`` with ``[P, N]`` log-weights (float64) and ancestry on the CPU.

    A particle whose weight has become 0 keeps it until resampling replaces it.
    """

    problem: AlignProblem
    latents: Tensor
    log_weights: Tensor
    ancestry: Tensor
    history: list[Resampling] = attrs.field(factory=list)

    @classmethod
    def start(cls, problem: AlignProblem) -> Self:
        """Equal weights at the initial noise."""
        shape = problem.noise.shape[:2]
        ancestry = torch.arange(shape[1]).expand(shape).clone()
        return cls(problem, problem.noise.flatten(0, 1), torch.zeros(shape, dtype=torch.float64), ancestry)

    def table(self, values: Tensor) -> Tensor:
        """Flat values ``[P * N]`` as ``[P, N]``, float64 on the CPU."""
        return values.double().cpu().view_as(self.log_weights)

    def reweigh(self, log_potential: Tensor) -> None:
        """Multiply the weights by potentials ``[P, N]``; NaN is a potential of 0.

        Raises :class:`NonFiniteError` where that leaves a prompt no particle of a weight above 0.
        """
        change = log_potential.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        dead = self.log_weights.isneginf()
        self.log_weights = (self.log_weights + change).masked_fill(dead, -torch.inf)
        if not bool(self.log_weights.isfinite().any(1).all()):
            raise NonFiniteError(
                "no particle of some prompt is left: each has had a value or a reward that was not finite. Check the "
                "estimator, or resample more often (ess_threshold), so that others take the place of those dropped."
            )

    def resample(self, step: int, sigma: float, values: Tensor, resampler: str, ess_threshold: float) -> Tensor:
        """Resample the prompts whose effective sample size is at most ``ess_threshold`` of the particles; the
        ancestors ``[P, N]``, the identity where weights are carried on.

        ``values [P, N]`` are what the weights were made of, for the history.
        """
        size, chosen, ancestors = draw_ancestors(self.log_weights, resampler, ess_threshold, self.problem.generators)
        self.history.append(Resampling(step, sigma, values.float(), size.float(), chosen, ancestors))
        self.log_weights = self.log_weights.masked_fill(chosen[:, None], 0)
        self.ancestry = self.ancestry.gather(1, ancestors)
        self.latents = self.latents[self.rows(ancestors)]
        return ancestors

    def rows(self, ancestors: Tensor) -> Tensor:
        """``[P * N]``: the flat row that each row descends from."""
        return (ancestors + self.problem.particles * torch.arange(len(ancestors))[:, None]).flatten()

    def finish(self, strength: float, log_product: Tensor) -> Particles:
        """Close the weights with the clean reward, ``exp(strength r)`` over the ``log_product [P, N]`` of the
        potentials so far; no last resampling, so that nothing is thrown away."""
        latents = self.latents.view_as(self.problem.noise)
        rewards, images = self.problem.finish(latents)
        self.reweigh(strength * rewards.double() - log_product)
        normalised = self.log_weights.log_softmax(1).float()
        return Particles(latents.cpu(), normalised, rewards, self.ancestry, images, tuple(self.history))
