"""PixArt's noise levels: a variance preserving schedule of discrete timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import attrs
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from stitchvm.core import ConfigError


@attrs.frozen(eq=False)
class Schedule:
    """``levels[t] = sqrt(1 - alpha_bar_t)`` for ``t = 0 .. T - 1``, rising, float32; linear between two timesteps."""

    config: dict[str, Any]
    levels: Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The schedule of a ``DPMSolverMultistepScheduler``; :class:`ConfigError` for one that predicts no noise."""
        scheduler = DPMSolverMultistepScheduler.from_config(dict(config))
        kind = scheduler.config.prediction_type
        if kind != "epsilon":
            raise ConfigError(f"the scheduler's prediction_type is {kind!r}, expected 'epsilon'.")
        return cls(dict(scheduler.config), (1 - scheduler.alphas_cumprod.float()).sqrt())

    @property
    def highest(self) -> float:
        """The largest level that the network was trained at, below 1."""
        return float(self.levels[-1])

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep ``[B]`` of levels ``[B]``; exact at the trained ones, clamped outside them."""
        levels = self.levels.to(sigma.device)
        low = (torch.searchsorted(levels, sigma, right=True) - 1).clamp(0, len(levels) - 2)
        return low + ((sigma - levels[low]) / (levels[low + 1] - levels[low])).clamp(0, 1)

    def sigmas(self, steps: int) -> Tensor:
        """``[steps + 1]`` falling levels: those that the scheduler visits, then 0.

        Raises :class:`ConfigError` for a number of steps that it cannot take.
        """
        scheduler = DPMSolverMultistepScheduler.from_config(self.config)
        if not 1 <= steps < len(self.levels):
            raise ConfigError(f"PixArt samples in 1 to {len(self.levels) - 1} steps, got {steps}.")
        scheduler.set_timesteps(steps)
        return torch.cat([self.levels[scheduler.timesteps.cpu().long()], torch.zeros(1)])
