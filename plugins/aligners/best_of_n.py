"""Best of N: independent samples, the one with the highest clean reward wins."""

from __future__ import annotations

from typing import ClassVar

import attrs

from stitchvm.core import AlignProblem, Particles


@attrs.frozen
class BestOfN:
    """``particles`` ODE samples a prompt; the selection is :attr:`Particles.best`. It ignores the estimator."""

    default_particles: ClassVar[int] = 4

    def run(self, problem: AlignProblem) -> Particles:
        """All N samples, equally weighted."""
        return problem.unweighted(problem.sample())
