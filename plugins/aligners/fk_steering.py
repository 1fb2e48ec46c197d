"""Feynman-Kac steering with local proposals (Singhal et al. 2025; paper, section 5).

Particles are reweighted by an estimator's value at some steps and resampled. Whatever the potential, the product along
one particle's ancestry, closed by the clean reward, is ``exp(strength r(z0))``: up to proposals, the weighted
particles follow ``p(z0) exp(strength r(z0))``, ``p`` being what the kernel alone samples.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from stitchvm.core import KERNELS, RESAMPLERS, AlignProblem, ConfigError, Kernel, Particles, Resampling, Transition
from stitchvm.core import effective_sample_size as ess

Window = tuple[float, float]


def _fractions(instance: object, attribute: attrs.Attribute[Window], window: Window) -> None:
    if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
        raise ConfigError(f"{attribute.name} is {window}; give two rising fractions of the steps, such as (0.2, 0.8).")


@attrs.frozen(kw_only=True)
class FKSteering:
    """Settings of FK steering; the number of particles is the problem's.

    ``strength``: lambda, in inverse units of the reward; the tilt is ``exp(strength r)``.
    ``potential``: of the values V_1 .. V_k seen so far at resampling steps, ``diff`` ``exp(strength (V_k - V_k-1))``
    with ``V_0 = 0``, ``max`` of their running maximum, ``add`` of their running sum.
    ``resampler``: ``multinomial`` or ``systematic``, when the effective sample size is at most ``ess_threshold`` of
    the particles: 1 always, 0 never. Weights that lead to no resampling are carried on.
    ``interval``, ``window``: resample every ``interval`` steps, the first and last at these fractions of the steps.
    ``proposals``: draws from the kernel a particle in the steps of ``proposal_window``, of which the best by the
    estimator is kept. It is greedy: for more than 1 the particles follow a sharper distribution than their weights say.
    ``kernel``: ``ode``, ``ancestral`` (``eta``) or ``sde`` (``diffusion``, ``scale``); unset parameters are the
    kernel's own.

    Raises :class:`ConfigError` for a value out of range or a parameter the kernel does not have.
    """

    default_particles: ClassVar[int] = 4

    strength: float = attrs.field(default=10.0, validator=attrs.validators.ge(0))
    potential: Literal["diff", "max", "add"] = attrs.field(
        default="diff", validator=attrs.validators.in_(("diff", "max", "add"))
    )
    resampler: Literal["multinomial", "systematic"] = attrs.field(
        default="multinomial", validator=attrs.validators.in_(tuple(RESAMPLERS))
    )
    ess_threshold: float = attrs.field(default=1.0, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    interval: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    window: Window = attrs.field(default=(0.2, 0.8), validator=_fractions)
    proposals: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    proposal_window: Window = attrs.field(default=(0.0, 0.4), validator=_fractions)
    kernel: Literal["ode", "ancestral", "sde"] = attrs.field(
        default="sde", validator=attrs.validators.in_(tuple(KERNELS))
    )
    diffusion: Literal["square", "sigma", "constant"] | None = None
    scale: float | None = None
    eta: float | None = None

    def __attrs_post_init__(self) -> None:
        self.transition_kernel()
        if self.kernel == "ode" and self.proposals > 1:
            raise ConfigError("the ode kernel draws no noise, so its proposals are all the same; use sde or ancestral.")

    def transition_kernel(self) -> Kernel:
        """The kernel with the parameters that were set."""
        kind = KERNELS[self.kernel]
        given = {name: getattr(self, name) for name in ("diffusion", "scale", "eta") if getattr(self, name) is not None}
        known = {field.name for field in attrs.fields(kind)}
        if surplus := sorted(set(given) - known):
            has = ", ".join(sorted(known)) or "no parameters"
            raise ConfigError(f"kernel {self.kernel!r} has no {' or '.join(surplus)}; it has {has}.")
        return kind(**given)

    def resampling_steps(self, steps: int) -> range:
        """Before which steps to resample: 8, 12 .. 32 of 40 and 6, 10 .. 22 of 28 (paper, section 5)."""
        first, last = (round(fraction * steps, 6) for fraction in self.window)
        return range(math.ceil(first), math.floor(last) + 1, self.interval)

    def proposal_steps(self, steps: int) -> range:
        """In which steps to draw proposals; none when ``proposals`` is 1."""
        first, last = (math.ceil(round(fraction * steps, 6)) for fraction in self.proposal_window)
        return range(first, last) if self.proposals > 1 else range(0)

    @torch.no_grad()
    def run(self, problem: AlignProblem) -> Particles:
        """Steer; raises :class:`ConfigError` without an estimator."""
        if problem.estimator is None:
            raise ConfigError("fk-steering needs a value: a stitched value model, another estimator or 'tweedie'.")
        kernel = self.transition_kernel()
        resampling, proposing = self.resampling_steps(problem.steps), self.proposal_steps(problem.steps)
        swarm = _Swarm.start(problem, self)
        known: Tensor | None = None  # the values of exactly these latents, where proposals have measured them
        for step, (sigma, sigma_next) in enumerate(zip(problem.sigmas[:-1], problem.sigmas[1:], strict=True)):
            prediction = problem.denoise(swarm.latents, sigma)
            if step in resampling:
                # The prediction is needed for the transition anyway, so Tweedie pays no further denoiser pass.
                values = problem.estimate(swarm.latents, sigma, prediction) if known is None else known
                prediction = prediction.index(swarm.resample(values, step, float(sigma)))
            transition = kernel(prediction, sigma_next.expand(len(swarm.latents)).to(swarm.latents))
            if step in proposing:
                swarm.latents, known = self._propose(problem, transition, sigma_next)
            else:
                swarm.latents, known = problem.draw(transition), None
            problem.progress(1 / problem.steps)
        return swarm.finish()

    def _propose(self, problem: AlignProblem, transition: Transition, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The best of several draws a particle and its value."""
        drawn = problem.draw(transition.repeat(self.proposals))
        values, best = problem.estimate(drawn, sigma).unflatten(0, (-1, self.proposals)).max(1)
        return drawn.unflatten(0, (-1, self.proposals))[torch.arange(len(best)), best.cpu()], values


@attrs.define(eq=False)
class _Swarm:
    """Particles under way: flat ``latents``, and ``[P, N]`` weights, potentials' memory and ancestry on the CPU."""

    problem: AlignProblem
    settings: FKSteering
    latents: Tensor
    log_weights: Tensor
    log_product: Tensor
    memory: Tensor
    ancestry: Tensor
    history: list[Resampling] = attrs.field(factory=list)

    @classmethod
    def start(cls, problem: AlignProblem, settings: FKSteering) -> _Swarm:
        shape = problem.noise.shape[:2]
        none = torch.zeros(shape, dtype=torch.float64)
        # A maximum starts below every value: starting at 0 would make all negative rewards equal.
        memory = torch.full_like(none, -torch.inf) if settings.potential == "max" else none
        ancestry = torch.arange(shape[1]).expand(shape).clone()
        return cls(problem, settings, problem.noise.flatten(0, 1), none, none, memory, ancestry)

    def resample(self, values: Tensor, step: int, sigma: float) -> Tensor:
        """Reweight by the potential and resample where the weights ask for it; the flat row each row now comes from."""
        seen = values.double().cpu().view_as(self.log_weights)
        log_potential = self.settings.strength * self._level(seen)
        self.log_weights = self.log_weights + log_potential
        self.log_product = self.log_product + log_potential
        size = ess(self.log_weights)
        particles = self.problem.particles
        # Rounding may put the size of equal weights a hair above N, and 1 means always.
        chosen = size <= self.settings.ess_threshold * particles * (1 + 1e-9)
        ancestors = torch.arange(particles).repeat(len(chosen), 1)
        for prompt in chosen.nonzero().flatten().tolist():
            weights = self.log_weights[prompt].softmax(0)
            ancestors[prompt] = RESAMPLERS[self.settings.resampler](weights, self.problem.generators[prompt])
        self.history.append(Resampling(step, sigma, seen.float(), size.float(), chosen, ancestors))
        self.log_weights = self.log_weights.masked_fill(chosen[:, None], 0)
        self.log_product, self.memory, self.ancestry = (
            table.gather(1, ancestors) for table in (self.log_product, self.memory, self.ancestry)
        )
        rows = (ancestors + particles * torch.arange(len(chosen))[:, None]).flatten()
        self.latents = self.latents[rows]
        return rows

    def _level(self, values: Tensor) -> Tensor:
        """The log-potential over ``strength``, before resampling."""
        if self.settings.potential == "diff":
            level, self.memory = values - self.memory, values
        elif self.settings.potential == "max":
            level = self.memory = torch.maximum(self.memory, values)
        else:
            level = self.memory = self.memory + values
        return level

    def finish(self) -> Particles:
        """Close the product with the clean reward; no last resampling, so that nothing is thrown away."""
        latents = self.latents.view_as(self.problem.noise)
        rewards, images = self.problem.finish(latents)
        log_weights = self.log_weights + self.settings.strength * rewards.double() - self.log_product
        normalised = log_weights.log_softmax(1).float()
        return Particles(latents.cpu(), normalised, rewards, self.ancestry, images, tuple(self.history))
