"""The plain sampler as a method like any other: what every gain is measured against."""

from __future__ import annotations

from typing import ClassVar

import attrs

from stitchvm.core import AlignProblem, ConfigError, Particles


@attrs.frozen
class Plain:
    """One ODE sample a prompt; it ignores the estimator."""

    default_particles: ClassVar[int] = 1

    def run(self, problem: AlignProblem) -> Particles:
        """Raises :class:`ConfigError` when asked for more than one particle."""
        if problem.particles != 1:
            raise ConfigError(f"sample draws one particle a prompt, not {problem.particles}; best-of-n draws several.")
        return problem.unweighted(problem.sample())
