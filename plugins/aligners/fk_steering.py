"""Feynman-Kac steering with local proposals (Singhal et al. 2025; paper, section 5).

Particles are reweighted by an estimator's value at some steps and resampled. Whatever the potential, the product along
one particle's ancestry, closed by the clean reward, is ``exp(strength r(z0))``: up to proposals, the weighted
particles follow ``p(z0) exp(strength r(z0))``, ``p`` being what the kernel alone samples.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from stitchvm.core import (
    RESAMPLERS,
    AlignProblem,
    Particles,
    Swarm,
    Window,
    steps_at,
    with_config_errors,
)

from .kernel_settings import WindowedSettings, in_fractions, rising_window
from .tempering import tempered

POTENTIALS = ("diff", "max", "add", "rt")


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class FKSteering(WindowedSettings):
    """Settings of FK steering; the number of particles is the problem's.

    ``strength``: lambda, in inverse units of the reward; the tilt is ``exp(strength r)``.
    ``potential``: of the values V_1 .. V_k seen so far at resampling steps, ``diff`` ``exp(strength (V_k - V_k-1))``
    with ``V_0 = 0``, ``max`` of their running maximum, ``add`` of their running sum, ``rt`` of V_k itself.
    ``resampler``: ``multinomial``, ``stratified``, ``systematic``, ``residual`` or ``ssp``, when the effective sample
    size is at most ``ess_threshold`` of the particles: 1 always, 0 never. Weights that lead to no resampling are
    carried on.
    ``interval``, ``window``: resample every ``interval`` steps, the first and last at these places, in ``unit``
    (``fraction`` of the steps, ``step`` numbers, ``sigma`` levels); or exactly at ``resample_at``. The defaults of both
    windows are in fractions alone: with another ``unit``, those that are used have to be given.
    ``proposals``: draws from the kernel a particle in the steps of ``proposal_window`` (its last left out); the best by
    the estimator is kept. It is greedy: for more than 1 the particles follow a sharper distribution than their
    weights say.
    ``tempering``: values count ``min((1 + tempering)^step - 1, 1)`` of their strength (DAS), all of it when None.

    Raises :class:`ConfigError` for a value out of range or a parameter the kernel does not have; :meth:`run` for places
    outside the steps there are.
    """

    default_particles: ClassVar[int] = 4

    strength: float = attrs.field(default=10.0, validator=[attrs.validators.ge(0), attrs.validators.lt(math.inf)])
    potential: Literal["diff", "max", "add", "rt"] = attrs.field(
        default="diff", validator=attrs.validators.in_(POTENTIALS)
    )
    resampler: Literal["multinomial", "stratified", "systematic", "residual", "ssp"] = attrs.field(
        default="multinomial", validator=attrs.validators.in_(tuple(RESAMPLERS))
    )
    ess_threshold: float = attrs.field(default=1.0, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    interval: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    window: Window | None = attrs.field(default=in_fractions(0.2, 0.8), validator=rising_window)
    resample_at: tuple[float, ...] | None = None
    proposals: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    proposal_window: Window | None = attrs.field(default=in_fractions(0.0, 0.4), validator=rising_window)
    tempering: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0)))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.proposals > 1:
            self.refuse_ode("its proposals are all the same")

    def resampling_steps(self, sigmas: Tensor) -> list[int]:
        """Before which steps to resample: 8, 12 .. 32 of 40 and 6, 10 .. 22 of 28 (paper, section 5)."""
        if self.resample_at is not None:
            return steps_at(sigmas, self.resample_at, self.unit)
        return self.steps_inside("window", sigmas)[:: self.interval]

    def proposal_steps(self, sigmas: Tensor) -> list[int]:
        """In which steps to draw proposals; none when ``proposals`` is 1."""
        if self.proposals == 1:
            return []
        return self.steps_inside("proposal_window", sigmas, include_end=False)

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Steer; raises :class:`ConfigError` without an estimator."""
        problem.require_value("fk-steering")
        kernel, sigmas = self.transition_kernel(), problem.sigmas
        resampling, proposing = self.resampling_steps(sigmas), self.proposal_steps(sigmas)
        swarm, potential = Swarm.start(problem), _Potential.start(self, problem)
        known: Tensor | None = None  # the values of exactly these latents, where proposals have measured them
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            if step in resampling and known is None:
                look = problem.look(swarm.latents, sigma)
                prediction, known = look.prediction, look.values
            else:
                prediction = problem.denoise(swarm.latents, sigma)
            if step in resampling:
                assert known is not None
                prediction = prediction.index(potential.resample(swarm, known, step, float(sigma)))
            transition = kernel(prediction, sigma_next.expand(len(swarm.latents)).to(swarm.latents))
            if step in proposing:
                swarm.latents, known, _ = problem.propose(transition, self.proposals, sigma_next)
            else:
                swarm.latents, known = problem.draw(transition), None
            problem.progress(1 / problem.steps)
        return swarm.finish(self.strength, potential.log_product)


@attrs.define(eq=False)
class _Potential:
    """The potentials' memory, and the product of those that a particle's weights have seen, ``[P, N]`` each."""

    settings: FKSteering
    memory: Tensor
    log_product: Tensor

    @classmethod
    def start(cls, settings: FKSteering, problem: AlignProblem) -> _Potential:
        none = torch.zeros(problem.noise.shape[:2], dtype=torch.float64)
        # A maximum starts below every value: starting at 0 would make all negative rewards equal.
        memory = torch.full_like(none, -torch.inf) if settings.potential == "max" else none
        return cls(settings, memory, none)

    def resample(self, swarm: Swarm, values: Tensor, step: int, sigma: float) -> Tensor:
        """Reweight and resample; the flat row that each row now comes from."""
        seen = swarm.table(values)
        share = tempered(self.settings.tempering, step)
        log_potential = self.settings.strength * self._level(share * seen)
        swarm.reweigh(log_potential)
        # A dropped particle's product is never read: its weight stays 0 until another takes its place.
        self.log_product = self.log_product + log_potential.nan_to_num(nan=0.0)
        settings = self.settings
        ancestors = swarm.resample(step, sigma, seen, settings.resampler, settings.ess_threshold)
        self.log_product, self.memory = (table.gather(1, ancestors) for table in (self.log_product, self.memory))
        return swarm.rows(ancestors)

    def _level(self, values: Tensor) -> Tensor:
        """The log-potential over ``strength``, before resampling; NaN where the value is."""
        kind, known = self.settings.potential, values.nan_to_num(nan=0.0)
        if kind == "diff":
            level, self.memory = values - self.memory, known
        elif kind == "max":
            self.memory = torch.maximum(self.memory, known)
            level = self.memory + 0 * values
        elif kind == "add":
            self.memory = self.memory + known
            level = self.memory + 0 * values
        else:
            level = values
        return level
