"""Rollover budget forcing (Kim et al. 2025): draw until the value rises, and save what was not needed for later."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from stitchvm.core import AlignProblem, Particles, Transition, with_config_errors

from .kernel_settings import KernelSettings


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class Rbf(KernelSettings):
    """Settings of rollover budget forcing; particles are independent chains, the best by clean reward is chosen.

    ``quota``: draws that a step adds to each chain's budget. The first draw whose value is above the chain's best so
    far is taken, and the rest of the budget rolls over to later steps; when it is used up, the best draw is taken. The
    last step, whose draws are finished images, draws once.

    Raises :class:`ConfigError` for a value out of range, and for the ``ode`` kernel, whose draws are all the same.
    """

    default_particles: ClassVar[int] = 1

    quota: int = attrs.field(default=5, validator=attrs.validators.ge(1))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.refuse_ode("all its draws are the same")

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Steer; raises :class:`ConfigError` without an estimator."""
        problem.require_value("rbf")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        latents = problem.noise.flatten(0, 1)
        budget = torch.zeros(len(latents), dtype=torch.int64)
        best = torch.full((len(latents),), -torch.inf)
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            transition = kernel(problem.denoise(latents, sigma), sigma_next.expand(len(latents)).to(latents))
            if step == problem.steps - 1:
                latents = problem.draw(transition)
            else:
                latents, values, used = _first_above(problem, transition, best, budget + self.quota, sigma_next)
                budget, best = budget + self.quota - used, torch.maximum(best, values)
            problem.progress(1 / problem.steps)
        return problem.unweighted(latents.view_as(problem.noise))


def _first_above(
    problem: AlignProblem, transition: Transition, bar: Tensor, budget: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's first draw of a value above ``bar [R]``, or its best of ``budget [R]``; with its value and the number
    of draws.

    A prompt draws for all its rows as long as one of them needs another draw: what a row gets depends on no other
    prompt. Only the rows that need one are evaluated.
    """
    taken, values = transition.mean.clone(), torch.full_like(bar, -torch.inf)
    used, open_rows = torch.zeros_like(budget), torch.ones_like(budget, dtype=torch.bool)
    owners = problem.owners(len(bar))
    while bool(open_rows.any()):
        drawn = problem.draw(transition, active=torch.zeros(problem.prompts, dtype=torch.bool).index_put(
            (owners[open_rows],), torch.tensor(True)))  # fmt: skip
        rows = open_rows.nonzero().flatten()
        found = problem.estimate(drawn[rows], sigma, owners=owners[rows]).cpu().nan_to_num(nan=-torch.inf)
        used[rows] += 1
        # The first draw is taken in any case: there may be no value at all above minus infinity.
        better = (found > values[rows]) | (used[rows] == 1)
        taken[rows[better]], values[rows[better]] = drawn[rows[better]], found[better]
        problem.begun.set_aside(rows[better], better.nonzero().flatten())
        open_rows[rows] = (found <= bar[rows]) & (used[rows] < budget[rows])
    problem.begun.bring_back(torch.arange(len(bar)))
    return taken, values, used
