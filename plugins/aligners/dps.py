"""Gradient guidance: diffusion posterior sampling over any value estimator (Chung et al. 2023; paper, section 5).

The sampler's score becomes ``score + strength grad V(z_t)``. With the soft value ``V = log E[exp r | z_t]`` and
strength 1 that is the exact score of the tilted distribution; original DPS takes Tweedie's estimate for V.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from stitchvm.core import (
    AlignProblem,
    ConfigError,
    Look,
    Particles,
    Prediction,
    Window,
    spread,
    with_config_errors,
)

from .kernel_settings import WindowedSettings, in_fractions, rising_window

NORMALISERS = ("raw", "norm", "rms-ratio", "epsilon", "unit-rms")
SCHEDULES = ("constant", "sigma", "alpha", "cosine")
FREEDOM_SHARE = 0.2


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class Dps(WindowedSettings):
    """Settings of gradient guidance; particles are independent samples, the best by clean reward is chosen.

    ``strength``: c in ``score + c g``, ``g`` the value's gradient as ``normaliser`` scales it, a sample at a time:
    ``raw`` as it is; ``norm`` to Euclidean norm 1; ``unit-rms`` to root mean square 1; ``rms-ratio`` (FreeDoM) so that
    the noise estimate (published: the next latent) changes by 0.2 of what classifier-free guidance of its scale changes
    it, which it needs; ``epsilon`` (UGD) ``eps - c sqrt(1 - alpha_bar) g``, with alpha_bar of the same signal-to-noise
    ratio on the variance preserving path: ``raw`` there, weaker on the flow path.
    ``schedule`` of the strength over the noise level: ``constant``, ``sigma`` (falling to 0), ``alpha`` (rising from
    0), ``cosine`` (highest half way).
    ``window`` in ``unit`` (``fraction`` of the steps, ``step`` numbers, ``sigma`` levels): guide in these steps alone,
    the last left out; outside no value is read. Its default, all of them, is in fractions alone.
    ``clip``: the most by which the noise estimate, itself of root mean square 1, may change in root mean square at a
    step, a sample at a time; larger changes are scaled down to it (None: no bound). A raw gradient has a heavy tail: at
    strengths that most samples can take, a few are driven off.
    ``repeats``: take every guided step so many times, going back to its level by fresh noise in between (time travel).

    Raises :class:`ConfigError` for a value out of range or a parameter the kernel does not have.
    """

    default_particles: ClassVar[int] = 1

    strength: float = attrs.field(default=1.0, validator=[attrs.validators.ge(0), attrs.validators.lt(math.inf)])
    normaliser: Literal["raw", "norm", "rms-ratio", "epsilon", "unit-rms"] = attrs.field(
        default="raw", validator=attrs.validators.in_(NORMALISERS)
    )
    schedule: Literal["constant", "sigma", "alpha", "cosine"] = attrs.field(
        default="constant", validator=attrs.validators.in_(SCHEDULES)
    )
    window: Window | None = attrs.field(default=in_fractions(0.0, 1.0), validator=rising_window)
    clip: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0)))
    repeats: int = attrs.field(default=1, validator=attrs.validators.ge(1))

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Guide; raises :class:`ConfigError` without an estimator."""
        problem.require_value("dps")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        guided = self.steps_inside("window", sigmas, include_end=False)
        latents = problem.noise.flatten(0, 1)
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            following = sigma_next.expand(len(latents)).to(latents)
            if step not in guided:
                latents = problem.draw(kernel(problem.denoise(latents, sigma), following))
            for left in reversed(range(self.repeats if step in guided else 0)):
                look = problem.differentiate(latents, sigma)
                prediction = look.prediction.guided(self.score_change(look))
                latents = problem.draw(kernel(prediction, following))
                if left:
                    latents = problem.renoise(latents, sigma_next, sigma)
            problem.progress(1 / problem.steps)
        return problem.unweighted(latents.view_as(problem.noise))

    def score_change(self, look: Look) -> Tensor:
        """``[R, C, h, w]``: what is added to the score."""
        prediction, gradients = look.prediction, look.gradients
        assert gradients is not None
        strength = self.strength * _share(self.schedule, prediction)
        change = spread(strength, gradients) * _normalised(self.normaliser, gradients, prediction)
        if self.clip is None:
            return change
        size = _rms(change) * spread(prediction.sigma, change)
        return change * (self.clip / size.clamp_min(self.clip))


def _share(schedule: str, prediction: Prediction) -> Tensor:
    """``[R]``: the part of the strength that counts at each row's level."""
    sigma = prediction.sigma
    return {
        "constant": torch.ones_like(sigma), "sigma": sigma, "alpha": prediction.path.alpha(sigma),
        "cosine": torch.sin(math.pi * sigma),
    }[schedule]  # fmt: skip


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean((1, 2, 3), keepdim=True).sqrt()


def _normalised(normaliser: str, gradients: Tensor, prediction: Prediction) -> Tensor:
    """The gradients scaled; one that is 0 stays 0."""
    if normaliser == "raw":
        return gradients
    sigma = spread(prediction.sigma, gradients)
    if normaliser == "epsilon":
        alpha = prediction.path.alpha(sigma)
        return gradients / (alpha.square() + sigma.square()).sqrt()
    size = _rms(gradients) * (math.sqrt(gradients[0].numel()) if normaliser == "norm" else 1)
    unit = gradients / size.masked_fill(size == 0, 1)
    if normaliser != "rms-ratio":
        return unit
    if prediction.contrast is None:
        raise ConfigError("rms-ratio measures classifier-free guidance; use a guidance_scale above 1, or unit-rms.")
    return unit * FREEDOM_SHARE * _rms(prediction.contrast) / sigma
