"""Dynamic search: a beam over noise levels (after Li et al. 2025): branch every particle, keep the prompt's best."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from stitchvm.core import AlignProblem, Particles, StepUnit, Window, steps_within, with_config_errors

from .kernel_settings import KernelSettings, rising_window


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class DSearch(KernelSettings):
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
    window: Window = attrs.field(default=(0.0, 0.8), validator=rising_window)
    unit: StepUnit = attrs.field(default="fraction", validator=attrs.validators.in_(("fraction", "step", "sigma")))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.refuse_ode("its branches are all the same")

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Search; raises :class:`ConfigError` without an estimator."""
        problem.require_value("dsearch")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        branching = steps_within(sigmas, self.window, self.unit)[:: self.interval]
        shape = problem.noise.shape[:2]
        latents, ancestry = problem.noise.flatten(0, 1), torch.arange(shape[1]).expand(shape).clone()
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            transition = kernel(problem.denoise(latents, sigma), sigma_next.expand(len(latents)).to(latents))
            if step in branching and step < problem.steps - 1:
                drawn, values = problem.propose(transition, self.branches, sigma_next)
                kept = _best(values, shape)
                rows = (kept + shape[1] * self.branches * torch.arange(shape[0])[:, None]).flatten()
                problem.begun.select(rows)
                latents, ancestry = drawn[rows], ancestry.gather(1, kept // self.branches)
            else:
                latents = problem.draw(transition)
            problem.progress(1 / problem.steps)
        return attrs.evolve(problem.unweighted(latents.view_as(problem.noise)), ancestry=ancestry)


def _best(values: Tensor, shape: torch.Size) -> Tensor:
    """``[P, N]``: the places of each prompt's N best among its draws, best first."""
    table = values.cpu().nan_to_num(nan=-torch.inf).view(shape[0], -1)
    return table.topk(shape[1], dim=1).indices
