"""Transition kernels ``p(z_s | z_t)`` with explicit mean and standard deviation.

All keep the path's marginals as the step shrinks and differ only in how much noise they put back, so particle
potentials, proposals, guidance and policy-gradient log-probabilities can share them.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import attrs
import torch
from torch import Tensor

from .paths import Prediction, spread

Diffusion = Literal["square", "sigma", "constant"]


@attrs.frozen(eq=False)
class Transition:
    """A Gaussian ``N(mean, std^2)``: ``mean [B, C, H, W]``, ``std [B]`` (zero for an ODE step)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std noise`` for standard normal ``noise``."""
        return self.mean + spread(self.std, self.mean) * noise

    def log_prob(self, latents: Tensor) -> Tensor:
        """``[B]``: log-density summed over the dimensions. Minus or plus infinity territory where ``std`` is zero."""
        std = spread(self.std, self.mean)
        each = -((latents - self.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return each.flatten(1).sum(1)

    def repeat(self, times: int) -> Transition:
        """Each sample's transition ``times`` in a row."""
        return Transition(self.mean.repeat_interleave(times, 0), self.std.repeat_interleave(times, 0))


class Kernel(Protocol):
    """``kernel(prediction, sigma_next)``: the transition from ``prediction.sigma`` to ``sigma_next`` (a lower
    level)."""

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition: ...


@attrs.frozen
class Ode:
    """The probability-flow ODE by Euler (DDIM) steps: ``alpha' z0 + sigma' eps``, no noise."""

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        level = spread(sigma_next, prediction.z0)
        mean = prediction.path.alpha(level) * prediction.z0 + level * prediction.eps
        return Transition(mean, torch.zeros_like(prediction.sigma))


@attrs.frozen
class Ancestral:
    """The forward process's own posterior, ``eta`` times its standard deviation; ``eta`` 0 is :class:`Ode`.

    ``std = eta sigma' sqrt(1 - SNR / SNR')``, ``mean = alpha' z0 + sqrt(sigma'^2 - std^2) eps`` (DDIM, eq. 16, for
    any path).
    """

    eta: float = attrs.field(default=1.0, validator=[attrs.validators.ge(0), attrs.validators.le(1)])

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        path, sigma = prediction.path, prediction.sigma
        ratio = path.alpha(sigma) * sigma_next / (path.alpha(sigma_next) * sigma)
        std = self.eta * sigma_next * (1 - ratio.square()).clamp_min(0).sqrt()
        level = spread(sigma_next, prediction.z0)
        rest = spread((sigma_next.square() - std.square()).clamp_min(0).sqrt(), prediction.z0)
        return Transition(path.alpha(level) * prediction.z0 + rest * prediction.eps, std)


@attrs.frozen
class Sde:
    """Reverse SDE by Euler-Maruyama (LinearSDE on the flow path): drift ``-u + g^2 score / 2``, noise ``g sqrt(dt)``.

    ``diffusion`` names ``g(sigma)``: ``square`` ``scale sigma^2`` (scale 3 is the released configuration of Kim et al.
    2025), ``sigma`` ``scale sigma``, ``constant`` ``scale``. ``g = 0`` is :class:`Ode`.
    """

    diffusion: Diffusion = attrs.field(
        default="square", validator=attrs.validators.in_(("square", "sigma", "constant"))
    )
    scale: float = attrs.field(default=3.0, validator=attrs.validators.ge(0))

    def g(self, sigma: Tensor) -> Tensor:
        """The diffusion coefficient at ``sigma``."""
        return self.scale * sigma ** {"square": 2, "sigma": 1, "constant": 0}[self.diffusion]

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        step = prediction.sigma - sigma_next
        g = self.g(prediction.sigma)
        drift = -prediction.velocity + spread(g.square() / 2, prediction.z0) * prediction.score
        return Transition(prediction.latents + drift * spread(step, prediction.z0), g * step.sqrt())


KERNELS: dict[str, type[Ode] | type[Ancestral] | type[Sde]] = {"ode": Ode, "ancestral": Ancestral, "sde": Sde}
