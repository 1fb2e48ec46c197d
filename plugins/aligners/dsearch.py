"""Dynamic search: a beam over noise levels (after Li et al. 2025): branch every particle, keep the prompt's best."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import attrs
import torch

from stitchvm.core import AlignProblem, Particles, Window, with_config_errors

from .kernel_settings import WindowedSettings, in_fractions, rising_window


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class DSearch(WindowedSettings):
    """Settings of the beam; its width is the number of particles.

    ``branches``: draws of every particle's transition at a branching step; of all a prompt's draws together the best by
    the estimator go on, so that a good particle may have several successors.
    ``interval``, ``window``: branch every ``interval`` steps within these places, in ``unit`` (``fraction`` of the
    steps, ``step`` numbers, ``sigma`` levels).

    Raises :class:`ConfigError` for a value out of range, and for the ``ode`` kernel, whose draws are all the same.
    """

    default_particles: ClassVar[int] = 4

    branches: int = attrs.field(default=4, validator=attrs.validators.ge(2))
    interval: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    window: Window | None = attrs.field(default=in_fractions(0.0, 0.8), validator=rising_window)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.refuse_ode("its branches are all the same")

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Search; raises :class:`ConfigError` without an estimator."""
        problem.require_value("dsearch")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        branching = self.steps_inside("window", sigmas)[:: self.interval]
        shape = problem.noise.shape[:2]
        latents, ancestry = problem.noise.flatten(0, 1), torch.arange(shape[1]).expand(shape).clone()
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            transition = kernel(problem.denoise(latents, sigma), sigma_next.expand(len(latents)).to(latents))
            if step in branching and step < problem.steps - 1:
                latents, _, parents = problem.propose(transition, self.branches, sigma_next, rivals=shape[1])
                ancestry = ancestry.flatten()[parents].view(shape)
            else:
                latents = problem.draw(transition)
            problem.progress(1 / problem.steps)
        return attrs.evolve(problem.unweighted(latents.view_as(problem.noise)), ancestry=ancestry)
