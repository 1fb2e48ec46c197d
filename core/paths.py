"""Gaussian noise paths ``z_t = alpha z0 + sigma eps``, on one scale: ``sigma`` in [0, 1], 0 clean, 1 pure noise.

A backbone says which path it lives on and what its network predicts; the path turns that into clean latent, noise,
velocity and score. Flow matching: ``alpha = 1 - sigma`` (paper, notation). Variance preserving: ``alpha = sqrt(1 -
sigma^2)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import attrs
import torch
from torch import Tensor

from .errors import ConfigError, NoiseLevelError, SliceError

PredictionKind = Literal["velocity", "epsilon", "v"]


def as_sigma(sigma: float | Tensor, latents: Tensor) -> Tensor:
    """``[B]`` float32 noise levels on the latents' device, from a number or a tensor of shape ``[]`` or ``[B]``.

    Raises :class:`NoiseLevelError` outside [0, 1] and :class:`SliceError` for another shape.
    """
    level = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
    if level.shape not in ((), (1,), (latents.shape[0],)):
        raise SliceError(f"sigma has shape {tuple(level.shape)}, expected one number or {latents.shape[0]} of them.")
    if level.device.type != "meta" and not bool(((level >= 0) & (level <= 1)).all()):
        raise NoiseLevelError(
            f"sigma must lie in [0, 1] (0 clean, 1 pure noise), got {level.min():g} to {level.max():g}. "
            "A scheduler's integer timestep must be divided by its number of training steps first."
        )
    return level.expand(latents.shape[0])


def spread(level: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, 1, ...]`` to broadcast against ``like``."""
    return level.reshape(-1, *([1] * (like.ndim - 1)))


@attrs.frozen(eq=False)
class Prediction:
    """What a denoiser says about one batch: ``z0`` and ``eps`` estimates ``[B, C, H, W]`` at ``latents``, ``sigma
    [B]``; under classifier-free guidance also the ``contrast``, by which it changes the noise estimate without the
    prompt: its scale times the estimate with the prompt less that without."""

    path: Path
    latents: Tensor
    sigma: Tensor
    z0: Tensor
    eps: Tensor
    contrast: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """``grad log p_t(z_t) = -eps / sigma``."""
        return -self.eps / spread(self.sigma, self.eps)

    @property
    def velocity(self) -> Tensor:
        """``dz / dsigma`` along the probability-flow ODE."""
        return spread(self.path.alpha_slope(self.sigma), self.z0) * self.z0 + self.eps

    def anchor(self, sigma: Tensor) -> Tensor:
        """``E[z_sigma | z_t]``: the latent at the lower level ``sigma [B]`` that this prediction expects; ``z0`` at 0.

        ``alpha_s z0 + (alpha_t / alpha_s) (sigma_s^2 / sigma_t) eps``, which is finite for every ``t > s``. On the flow
        path it is ``((1-s)/t) ((t + a s^2/(1-s)) z_t - (t^2 - a^2 s^2) v)`` with ``a = (1-t)/(1-s)``; for the exact
        conditional velocity of ``z_s`` it is ``z_s`` itself.
        """
        low, high = self.path.alpha(sigma), self.path.alpha(self.sigma)
        rest = high / low * sigma.square() / self.sigma
        return spread(low, self.z0) * self.z0 + spread(rest, self.eps) * self.eps

    def distance(self, other: Prediction) -> Tensor:
        """``[B]``: the mean squared difference of two predictions at the same latents, as velocities: ``eps - z0`` on
        the flow path, ``alpha eps - sigma z0`` (v-prediction) on the variance preserving one. Finite everywhere.

        Neither holds the latents, so that their gradient is what the networks make of them alone."""
        level = spread(self.sigma, self.z0)
        ours, theirs = (self.path.target(one.z0, one.eps, level) for one in (self, other))
        return (ours - theirs).square().flatten(1).mean(1)

    def guided(self, gradient: Tensor) -> Prediction:
        """The prediction of a sampler whose score is ``score + gradient`` (``gradient [B, C, H, W]``): guidance, once
        for every kernel.

        ``eps - sigma gradient`` and ``z0 + (sigma^2 / alpha) gradient``. Where ``alpha`` is 0 the latent says nothing
        of the clean one, so that no value has a gradient: there the prediction stays as it is.
        """
        level = spread(self.sigma, self.z0)
        alpha = self.path.alpha(level)
        noise = alpha == 0
        gradient = gradient.masked_fill(noise, 0)
        z0 = self.z0 + level**2 / alpha.masked_fill(noise, 1) * gradient
        return attrs.evolve(self, z0=z0, eps=self.eps - level * gradient)

    def on(self, path: Path) -> Prediction:
        """The same prediction on another path: at the level of the same signal-to-noise ratio, ``z0`` and ``eps`` as
        they are, ``latents`` and ``sigma`` in float64 (see :meth:`Path.convert`)."""
        sigma, scale = self.path.convert(self.sigma, path)
        return attrs.evolve(self, path=path, latents=spread(scale, self.latents) * self.latents, sigma=sigma)

    def detach(self) -> Prediction:
        """The same numbers without their graph."""
        contrast = None if self.contrast is None else self.contrast.detach()
        return Prediction(self.path, self.latents.detach(), self.sigma, self.z0.detach(), self.eps.detach(), contrast)

    def index(self, rows: Tensor | slice) -> Prediction:
        """The chosen samples."""
        contrast = None if self.contrast is None else self.contrast[rows]
        return Prediction(self.path, self.latents[rows], self.sigma[rows], self.z0[rows], self.eps[rows], contrast)


class Path(ABC):
    """One noise path. Numbers and tensors of any shape go in, the same shape comes out."""

    name: str

    @abstractmethod
    def alpha(self, sigma: Tensor) -> Tensor:
        """The signal's weight at noise level ``sigma``."""

    @abstractmethod
    def alpha_slope(self, sigma: Tensor) -> Tensor:
        """``d alpha / d sigma``."""

    @abstractmethod
    def sigma_at(self, ratio: Tensor) -> Tensor:
        """The noise level where ``alpha / sigma`` is ``ratio``, in [0, inf]."""

    @abstractmethod
    def target(self, z0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """What a network that predicts velocities on this path is regressed to, of these and without the latents. On
        the variance preserving path (v-prediction) it is not :attr:`Prediction.velocity`."""

    def convert(self, sigma: Tensor, path: Path) -> tuple[Tensor, Tensor]:
        """The level on ``path`` of the same ratio ``alpha / sigma``, and what to multiply latents of this path by to
        have them there. Finite at both ends.

        Both in float64: variance preserving levels crowd below 1, where float32 has too few numbers for ``alpha``.
        """
        sigma = sigma.double()
        alpha = self.alpha(sigma)
        level = path.sigma_at(alpha / sigma)
        # alpha and sigma share one scale; their sum, unlike either, is never 0.
        return level, (path.alpha(level) + level) / (alpha + sigma)

    def add_noise(self, z0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
        """``alpha z0 + sigma eps`` in float32 or better; ``sigma`` a number or ``[B]``."""
        level = spread(as_sigma(sigma, z0), z0)
        return self.alpha(level) * z0 + level * eps

    def transfer(self, sigma: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        """``(weight, std)`` of the forward process from ``sigma`` to the higher level ``back``: ``z_back = weight
        z_sigma + std noise`` (paper, D.1, ``alpha_bar`` and ``sigma_bar``)."""
        weight = self.alpha(back) / self.alpha(sigma)
        return weight, (back.square() - (weight * sigma).square()).clamp_min(0).sqrt()

    def interpret(self, kind: PredictionKind, output: Tensor, latents: Tensor, sigma: Tensor) -> Prediction:
        """A network's output as a :class:`Prediction`.

        ``velocity`` is flow matching's ``eps - z0``, ``epsilon`` the noise, ``v`` is ``alpha eps - sigma z0`` (variance
        preserving). Raises :class:`ConfigError` for a kind this path has no formula for.
        """
        level = spread(sigma, latents)
        alpha = self.alpha(level)
        if kind == "velocity" and isinstance(self, FlowPath):
            z0, eps = latents - level * output, latents + alpha * output
        elif kind == "epsilon":
            z0, eps = (latents - level * output) / alpha, output
        elif kind == "v" and isinstance(self, VariancePreservingPath):
            z0, eps = alpha * latents - level * output, level * latents + alpha * output
        else:
            raise ConfigError(f"a {kind!r} prediction is not defined on the {self.name} path.")
        return Prediction(self, latents, sigma, z0, eps)


class FlowPath(Path):
    """Rectified flow (SD 3, SD 3.5, FLUX)."""

    name = "flow"

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def alpha_slope(self, sigma: Tensor) -> Tensor:
        return -torch.ones_like(sigma)

    def sigma_at(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + ratio)

    def target(self, z0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return eps - z0


class VariancePreservingPath(Path):
    """Variance preserving (SD 1.5, SDXL): ``sigma = sqrt(1 - alpha_bar)``."""

    name = "variance-preserving"

    def alpha(self, sigma: Tensor) -> Tensor:
        return (1 - sigma.square()).clamp_min(0).sqrt()

    def alpha_slope(self, sigma: Tensor) -> Tensor:
        return -sigma / self.alpha(sigma)

    def sigma_at(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + ratio.square()).sqrt()

    def target(self, z0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return self.alpha(sigma) * eps - sigma * z0
