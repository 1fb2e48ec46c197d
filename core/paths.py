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
    [B]``."""

    path: Path
    latents: Tensor
    sigma: Tensor
    z0: Tensor
    eps: Tensor

    @property
    def score(self) -> Tensor:
        """``grad log p_t(z_t) = -eps / sigma``."""
        return -self.eps / spread(self.sigma, self.eps)

    @property
    def velocity(self) -> Tensor:
        """``dz / dsigma`` along the probability-flow ODE."""
        return spread(self.path.alpha_slope(self.sigma), self.z0) * self.z0 + self.eps

    def index(self, rows: Tensor | slice) -> Prediction:
        """The chosen samples."""
        return attrs.evolve(
            self, latents=self.latents[rows], sigma=self.sigma[rows], z0=self.z0[rows], eps=self.eps[rows]
        )


class Path(ABC):
    """One noise path. Numbers and tensors of any shape go in, the same shape comes out."""

    name: str

    @abstractmethod
    def alpha(self, sigma: Tensor) -> Tensor:
        """The signal's weight at noise level ``sigma``."""

    @abstractmethod
    def alpha_slope(self, sigma: Tensor) -> Tensor:
        """``d alpha / d sigma``."""

    def add_noise(self, z0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
        """``alpha z0 + sigma eps`` in float32 or better; ``sigma`` a number or ``[B]``."""
        level = spread(as_sigma(sigma, z0), z0)
        return self.alpha(level) * z0 + level * eps

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


class VariancePreservingPath(Path):
    """Variance preserving (SD 1.5, SDXL): ``sigma = sqrt(1 - alpha_bar)``."""

    name = "variance-preserving"

    def alpha(self, sigma: Tensor) -> Tensor:
        return (1 - sigma.square()).clamp_min(0).sqrt()

    def alpha_slope(self, sigma: Tensor) -> Tensor:
        return -sigma / self.alpha(sigma)
