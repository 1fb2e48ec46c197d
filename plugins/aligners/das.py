"""Twisted sequential Monte Carlo with gradient proposals: DAS (Kim et al. 2025).

Transitions are drawn from the kernel shifted by the value's gradient, and the weights pay for it: whatever the value,
the weighted particles follow ``p(z0) exp(strength r(z0))``, ``p`` being what the kernel alone samples.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from stitchvm.core import RESAMPLERS, AlignProblem, Look, Particles, Swarm, Transition, spread, with_config_errors

from .kernel_settings import KernelSettings
from .tempering import tempered


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class Das(KernelSettings):
    """Settings of twisted SMC; the number of particles is the problem's.

    ``strength``: in inverse units of the reward; the tilt is ``exp(strength r)``, 1 / the published KL coefficient.
    ``tempering``: the twist counts ``min((1 + tempering)^step - 1, 1)`` of it, all when None (0.008 for 100 steps as
    published). A transition ``N(m, s^2)`` becomes ``N(m + s^2 twist gradient, s^2)``.
    ``resampler``, ``ess_threshold``: resample when the effective sample size is at most this part of the particles;
    weights that lead to no resampling are carried on.

    Raises :class:`ConfigError` for a value out of range, and for the ``ode`` kernel, which has no noise to shift.
    """

    default_particles: ClassVar[int] = 4

    strength: float = attrs.field(default=10.0, validator=[attrs.validators.ge(0), attrs.validators.lt(math.inf)])
    tempering: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0)))
    resampler: Literal["multinomial", "stratified", "systematic", "residual", "ssp"] = attrs.field(
        default="ssp", validator=attrs.validators.in_(tuple(RESAMPLERS))
    )
    ess_threshold: float = attrs.field(default=0.5, validator=[attrs.validators.ge(0), attrs.validators.le(1)])

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.refuse_ode("there is nothing to shift")

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Steer; raises :class:`ConfigError` without an estimator."""
        problem.require_value("das")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        swarm = Swarm.start(problem)
        product = torch.zeros_like(swarm.log_weights)  # of the twists that the weights have seen
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            look = problem.differentiate(swarm.latents, sigma)
            share = self.strength * tempered(self.tempering, step)
            values = swarm.table(look.values)
            swarm.reweigh(share * values - product)
            product = (share * values).nan_to_num(nan=0.0)
            ancestors = swarm.resample(step, float(sigma), values, self.resampler, self.ess_threshold)
            product, rows = product.gather(1, ancestors), swarm.rows(ancestors)
            transition = kernel(look.prediction.index(rows), sigma_next.expand(len(rows)).to(swarm.latents))
            swarm.latents, correction = _shifted_draw(problem, transition, share, look, rows)
            swarm.reweigh(swarm.table(correction))
            problem.progress(1 / problem.steps)
        return swarm.finish(self.strength, product)


def _shifted_draw(
    problem: AlignProblem, transition: Transition, share: float, look: Look, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """A draw of the shifted transition, and its density under the kernel over that under the proposal ``[R]``, log."""
    assert look.gradients is not None
    shift = spread(transition.std.square(), transition.mean) * share * look.gradients[rows]
    proposal = attrs.evolve(transition, mean=transition.mean + shift)
    drawn = problem.draw(proposal)
    if not bool((transition.std > 0).all()):  # a last step without noise is not shifted
        return drawn, torch.zeros(len(rows))
    return drawn, transition.log_prob(drawn) - proposal.log_prob(drawn)
