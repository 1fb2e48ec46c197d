"""SVDD: soft value-based decoding (Li et al. 2024): at every step the best of several draws, no weights, no mixing."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import attrs
import torch

from stitchvm.core import AlignProblem, Particles, Window, with_config_errors

from .kernel_settings import WindowedSettings, in_fractions, rising_window


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class Svdd(WindowedSettings):
    """Settings of SVDD; particles are independent chains, the best by clean reward is chosen.

    ``proposals``: draws a step (20 as published); the one of highest value is kept.
    ``window`` in ``unit`` (``fraction`` of the steps, ``step`` numbers, ``sigma`` levels): choose in these steps, draw
    once in the others; its last is left out, and so is the last step, whose draws are finished images.

    Raises :class:`ConfigError` for a value out of range, and for the ``ode`` kernel, whose draws are all the same.
    """

    default_particles: ClassVar[int] = 1

    proposals: int = attrs.field(default=20, validator=attrs.validators.ge(1))
    window: Window | None = attrs.field(default=in_fractions(0.0, 1.0), validator=rising_window)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.proposals > 1:
            self.refuse_ode("its proposals are all the same")

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Steer; raises :class:`ConfigError` without an estimator."""
        problem.require_value("svdd")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        choosing = self.steps_inside("window", sigmas, include_end=False)
        latents = problem.noise.flatten(0, 1)
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            transition = kernel(problem.denoise(latents, sigma), sigma_next.expand(len(latents)).to(latents))
            if step in choosing and step < problem.steps - 1:
                latents, _, _ = problem.propose(transition, self.proposals, sigma_next)
            else:
                latents = problem.draw(transition)
            problem.progress(1 / problem.steps)
        return problem.unweighted(latents.view_as(problem.noise))
