"""Transition kernels ``p(z_s | z_t)`` with explicit mean and standard deviation.

They differ only in how much noise they put back, so particle potentials, proposals, guidance and policy-gradient
log-probabilities can share them. All but :class:`Cps` keep the path's marginals as the step shrinks.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import attrs
import torch
from torch import Tensor

from .errors import ConfigError
from .paths import Path, Prediction, spread

Diffusion = Literal["square", "sigma", "constant", "grpo", "paper"]

_SCALES: dict[Diffusion, float] = {"square": 3.0, "sigma": 1.0, "constant": 1.0, "grpo": 0.7}
"""Each diffusion's own scale; ``paper`` has none."""


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
class Cps:
    """Coefficients-preserving sampling: ``std = sigma' sin(noise_level pi/2)``, the rest of ``sigma'`` for ``eps``.

    ``mean = alpha' z0 + sigma' cos(noise_level pi/2) eps`` (Flow-GRPO's ``cps``, for any path): the weights of clean
    latent and noise are the path's own at every step, however coarse. ``noise_level`` in [0, 1]: 0 is :class:`Ode`; 1
    renoises, ``alpha' z0 + sigma' noise`` (``stochastic_sampling`` of diffusers' flow-matching scheduler).

    It puts back the same share of the noise whatever the step, so it keeps the marginals only where ``z0`` is certain.
    Elsewhere more steps make samples too narrow, not right: for Gaussian data of deviation ``s`` the variance ``v =
    alpha^2 s^2 + sigma^2`` becomes ``v (1 + c) / (2 - (1 - c) sigma^2 / v)`` with ``c = cos(noise_level pi/2)``, at
    the end ``s^2 (1 + c) / 2``.
    """

    noise_level: float = attrs.field(default=0.8, validator=[attrs.validators.ge(0), attrs.validators.le(1)])

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        angle = self.noise_level * math.pi / 2
        level = spread(sigma_next, prediction.z0)
        mean = prediction.path.alpha(level) * prediction.z0 + math.cos(angle) * level * prediction.eps
        return Transition(mean, math.sin(angle) * sigma_next)


@attrs.frozen
class Sde:
    """Reverse SDE by Euler-Maruyama (LinearSDE on the flow path): drift ``-u + g^2 score / 2``, noise ``g sqrt(dt)``.

    ``diffusion`` names ``g(sigma)``: ``square`` ``scale sigma^2`` (scale 3 is the released configuration of Kim et al.
    2025), ``sigma`` ``scale sigma``, ``constant`` ``scale``, ``grpo`` ``scale sqrt(sigma / alpha)`` (Flow-GRPO),
    ``paper`` ``2 sqrt(sigma / alpha)`` (paper, appendix), which takes no scale. ``scale`` None is 3, 1, 1 and 0.7.
    Where ``alpha`` is 0, at pure noise, it is that of the step's end (as in Flow-GRPO).

    Along ``-u`` the step is :class:`Ode`'s, which is Euler's on the flow path and stays finite at sigma 1 on others; so
    ``scale`` 0 is the ODE. The error is of first order in the step, but for ``grpo`` from pure noise on the flow path,
    where its ``g`` is infinite: there it falls as ``steps^(-scale^2)`` while ``scale`` is below 1.

    Raises :class:`ConfigError` for ``paper`` with a scale.
    """

    diffusion: Diffusion = attrs.field(default="square", validator=attrs.validators.in_((*_SCALES, "paper")))
    scale: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))

    def __attrs_post_init__(self) -> None:
        if self.diffusion == "paper" and self.scale is not None:
            raise ConfigError(
                f"diffusion 'paper' has no scale, got {self.scale:g}; 'grpo' is the same g with one ('paper' is its 2)."
            )

    def g(self, path: Path, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """``[B]``: the diffusion coefficient of the step from ``sigma`` to ``sigma_next``."""
        scale = _SCALES.get(self.diffusion, 2.0) if self.scale is None else self.scale
        if self.diffusion in ("grpo", "paper"):
            alpha = path.alpha(sigma)
            return scale * (sigma / torch.where(alpha == 0, path.alpha(sigma_next), alpha)).sqrt()
        return scale * sigma ** {"square": 2, "sigma": 1, "constant": 0}[self.diffusion]

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        step = prediction.sigma - sigma_next
        g = self.g(prediction.path, prediction.sigma, sigma_next)
        pull = spread(g.square() / 2 * step, prediction.z0) * prediction.score
        return Transition(Ode()(prediction, sigma_next).mean + pull, g * step.sqrt())


@attrs.frozen
class OnPath:
    """``kernel`` on another path: predictions are converted to ``path``, the step taken there, its result scaled back.

    Interpolant conversion (Kim et al. 2025): levels of one path stand for those of the same signal-to-noise ratio on
    the other. It matters to :class:`Sde` alone, whose ``g`` and time are then those of ``path``; :class:`Ode`,
    :class:`Ancestral` and :class:`Cps` take the same step on every path.
    """

    kernel: Kernel
    path: Path

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        own, dtype = prediction.path, prediction.z0.dtype
        level, scale = own.convert(sigma_next, self.path)
        there = self.kernel(prediction.on(self.path), level)
        mean = (there.mean / spread(scale, there.mean)).to(dtype)
        return Transition(mean, (there.std / scale).to(prediction.sigma.dtype))


KERNELS: dict[str, type[Ode] | type[Ancestral] | type[Cps] | type[Sde]] = {
    "ode": Ode,
    "ancestral": Ancestral,
    "cps": Cps,
    "sde": Sde,
}
