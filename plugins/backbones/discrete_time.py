"""Noise levels and discrete timesteps of a variance preserving diffusers scheduler (DDIM, PNDM, Euler, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import attrs
import diffusers
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor

from stitchvm.core import ConfigError, PredictionKind

_PREDICTIONS: dict[str, PredictionKind] = {"epsilon": "epsilon", "v_prediction": "v"}

_HIGHEST = 1 - 2**-24
"""The largest float32 below 1: the signal's weight ``sqrt(1 - sigma^2)`` stays above 0 there, and is divided by."""


@attrs.frozen(eq=False)
class DiscreteTime:
    """A scheduler's training schedule: ``sigmas[t] = sqrt(1 - alpha_bar_t)`` for ``t = 0 .. T - 1``, rising, float32.

    Between two timesteps both directions interpolate linearly; outside the trained range they clamp. The largest
    trained level is below 1 (0.9977 for Stable Diffusion), so pure noise is read at ``t = T - 1``, as the pipelines
    start from it. A schedule that was rescaled to zero terminal SNR reaches 1 and is stopped just short of it.
    """

    scheduler: SchedulerMixin
    sigmas: Tensor
    prediction: PredictionKind

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """The schedule behind a diffusers scheduler, which is left as it is.

        Raises :class:`ConfigError` for one that is not variance preserving, or whose network predicts something else
        than noise or ``v``.
        """
        config, alphas = getattr(scheduler, "config", {}), getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor) or config.get("use_flow_sigmas"):
            raise ConfigError(
                f"{type(scheduler).__name__} has no variance preserving schedule; expected a scheduler such as "
                "DDIMScheduler, PNDMScheduler or EulerDiscreteScheduler."
            )
        kind = config.get("prediction_type", "epsilon")
        if kind not in _PREDICTIONS:
            raise ConfigError(
                f"the scheduler's prediction_type is {kind!r}; expected one of {', '.join(_PREDICTIONS)}."
            )
        sigmas = (1 - alphas.detach().float().cpu()).sqrt().clamp_max(_HIGHEST)
        return cls(type(scheduler).from_config(config), sigmas, _PREDICTIONS[kind])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The schedule that a ``scheduler_config.json`` describes; raises as :meth:`of`."""
        name = config.get("_class_name")
        kind: Any = getattr(diffusers, str(name), None)
        known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
        if not known:
            raise ConfigError(f"the scheduler's _class_name is {name!r}, which diffusers does not have.")
        return cls.of(kind.from_config(dict(config)))

    @property
    def highest(self) -> float:
        """The largest noise level the network was trained at."""
        return float(self.sigmas[-1])

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep in ``[0, T - 1]`` of noise levels of any shape; exact at the trained levels."""
        table = self.sigmas.to(sigma.device)
        low = (torch.bucketize(sigma, table, right=True) - 1).clamp(0, len(table) - 2)
        span = (table[low + 1] - table[low]).clamp_min(torch.finfo(table.dtype).tiny)
        return low + ((sigma - table[low]) / span).clamp(0, 1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level, float32, of (fractional) timesteps of any shape: the inverse of :meth:`timestep`."""
        table = self.sigmas.to(timestep.device)
        place = timestep.double().clamp(0, len(table) - 1)
        low = place.long().clamp_max(len(table) - 2)
        return torch.lerp(table[low].double(), table[low + 1].double(), place - low).float()

    def grid(self, steps: int) -> Tensor:
        """``[steps + 1]`` falling levels: those of the timesteps that the scheduler visits, and 0.

        A scheduler with ``set_alpha_to_one=False`` stops at ``sigmas[0]`` (0.03) instead; the clean latent is what its
        last step estimates. Raises :class:`ConfigError` for a number of steps that the scheduler cannot take.
        """
        if steps < 1:
            raise ConfigError(f"sampling needs at least 1 step, got {steps}.")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        try:
            scheduler.set_timesteps(steps)
        except ValueError as error:
            raise ConfigError(f"{type(scheduler).__name__} cannot take {steps} steps: {error}") from error
        levels = _own_levels(scheduler)
        if levels is None or unit_signal(scheduler):
            # Multistep schedulers visit a timestep twice (PNDM the second one).
            visited = self.sigma(torch.as_tensor(scheduler.timesteps).unique_consecutive())
            levels = torch.cat([visited, torch.zeros(1)])
        if len(levels) != steps + 1 or bool((levels.diff() >= 0).any()):
            raise ConfigError(
                f"{type(scheduler).__name__} does not visit {steps} falling noise levels in {steps} steps; "
                f"take fewer, at most {len(self.sigmas) - 1}."
            )
        return levels


def unit_signal(scheduler: Any) -> bool:
    """Whether a scheduler's latents are ``z0 + s eps``, ``s`` its own sigma, instead of ``alpha z0 + sigma eps``."""
    return isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)


def _own_levels(scheduler: Any) -> Tensor | None:
    """``[steps + 1]``, float32: the levels that a scheduler steps between and then 0, where it has ratios of its own.

    Its timesteps are these rounded: with Karras's spacing (``use_karras_sigmas``) several may be the same.
    """
    own = getattr(scheduler, "sigmas", None)
    if own is None:
        return None
    ratio = own.double().cpu()
    return torch.cat([(ratio / (1 + ratio.square()).sqrt())[:-1], ratio.new_zeros(1)]).float()


def pipeline_levels(scheduler: Any, time: DiscreteTime) -> Tensor:
    """``[steps + 1]``, float32: the levels of the steps that a scheduler was set to, then 0.

    Raises :class:`ConfigError` for a scheduler that keeps its latents in yet another scale, or that leaves the path
    between two timesteps.
    """
    own = _own_levels(scheduler)
    if own is not None and unit_signal(scheduler):
        return own
    runge_kutta = isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps
    preserved = getattr(scheduler, "init_noise_sigma", None) == 1 and hasattr(scheduler, "alphas_cumprod")
    preserved = preserved and not scheduler.config.get("use_flow_sigmas", False)
    if runge_kutta or not preserved:
        problem = " without skip_prk_steps" if runge_kutta else ""
        raise ConfigError(
            f"the latents of a {type(scheduler).__name__}{problem} are not at a known noise level after each step; "
            "use DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, or PNDMScheduler with skip_prk_steps."
        )
    return (
        own if own is not None else torch.cat([time.sigma(torch.as_tensor(scheduler.timesteps).cpu()), torch.zeros(1)])
    )
