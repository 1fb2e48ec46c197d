"""Monte Carlo rollouts: the value estimator that samples what it averages over, at many denoiser passes a value."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from .errors import ConfigError
from .estimators import Prompted
from .joint import AnyReward
from .kernels import Ancestral, Kernel
from .paths import Prediction, as_sigma
from .sampling import seeded_noise
from .seeds import stream_seed
from .validators import whole_from


def _positive(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"MonteCarlo: {attribute.name} is {value}; give a finite number above 0, or soft=False for the mean, its "
            "limit at 0."
        )


def levels_below(schedule: Tensor, sigma: Tensor) -> Tensor:
    """``[steps + 1, B]``: from ``sigma [B]`` (above 0) to 0 at the pace of ``schedule [steps + 1]``, which ends in 0.

    The schedule, read as a piecewise linear function of time, is entered where it passes ``sigma``, and what is left of
    it is cut into as many equal times: its spacing (a shift towards high noise, a dense end) is kept, and from its top
    it comes out as it is. A ``sigma`` above the top takes the first step to where the schedule's own first step ends.
    """
    rising, steps = schedule.flip(0).contiguous(), len(schedule) - 1
    above = torch.searchsorted(rising, sigma.contiguous()).clamp(1, steps)
    low, high = rising[above - 1], rising[above]
    entered = (above - 1 + (sigma - low) / (high - low)).clamp_max(steps)
    times = entered * torch.arange(steps, -1, -1, device=sigma.device)[:, None] / steps
    below = times.long().clamp_max(steps - 1)
    levels = torch.lerp(rising[below], rising[below + 1], times - below)
    return torch.cat([sigma[None], levels[1:]])


@attrs.frozen(eq=False)
class MonteCarlo:
    """The mean reward of ``rollouts`` denoisings of ``z_t`` by ``kernel`` in ``steps``: ``E[r(z0) | z_t]``.

    As steps shrink this is the posterior of the forward process (what ``E[z0 | z_t]`` and a trained value are means of)
    for :class:`Ancestral`, whose mean is right at any number of steps where the denoiser is linear and whose variance
    grows to the posterior's, to first order in the steps' size; on the flow path also for ``Sde("grpo", 2 ** 0.5)``. A
    kernel with other noise keeps the marginal of ``z0`` but not ``z0`` given ``z_t``: the less of it :class:`Sde` puts
    back, the closer rollouts stay to where the ODE leads. With ``kernel=Sde()`` it is the value of sampling on by that.

    ``soft``: ``(1 / strength) log E[exp(strength r(z0)) | z_t]`` in its place, ``strength`` in inverse units of the
    reward; as the log of a mean of few it is too low, by ``Var[exp(strength r)] / E[exp(strength r)]^2 / (2 strength
    rollouts)`` to first order. Rollouts run under the context's prompt and guidance, at the pace of the backbone's own
    schedule (:func:`levels_below`), and share the first step's prediction: ``rollouts (steps - 1) + 1`` denoiser
    passes, one less when ``prediction`` is given, and ``rollouts`` decodings. At sigma 0 it is the clean reward of one
    decoding.

    Differentiable in the latents through every step, all of whose graphs are kept then. The noise of a rollout's step
    comes from (``seed``, rollout, step, sigma) alone and is the same for all latents at one level: values of latents
    are compared under common random numbers, which lowers the variance of their differences, and depend neither on the
    batch nor on the order in it. A kernel without noise needs one rollout.

    Raises :class:`ConfigError` for ``rollouts`` or ``steps`` below 1, a negative ``seed`` or a ``strength`` not above
    0.
    """

    through_denoiser: ClassVar[bool] = True

    reward: AnyReward
    rollouts: int = attrs.field(default=4, validator=whole_from(1))
    steps: int = attrs.field(default=8, validator=whole_from(1))
    soft: bool = False
    strength: float = attrs.field(default=1.0, validator=_positive)
    kernel: Kernel = attrs.field(factory=Ancestral)
    seed: int = attrs.field(default=0, validator=whole_from(0))

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        level = as_sigma(sigma, latents)
        noisy, clean = (level > 0).nonzero().flatten(), (level == 0).nonzero().flatten()
        if not len(noisy):
            return self._rate(latents, context)
        if not len(clean):
            return self._value(prediction or context.denoiser(latents, level), level, context)
        known = None if prediction is None else prediction.index(noisy)
        parts = [
            self(latents[noisy], level[noisy], context.index(noisy), known),
            self._rate(latents[clean], context.index(clean)),
        ]
        return torch.cat(parts)[torch.cat([noisy, clean]).argsort()]

    def _value(self, first: Prediction, sigma: Tensor, context: Prompted) -> Tensor:
        height, width = first.latents.shape[-2:]
        schedule = context.denoiser.backbone.sigmas(self.steps, (height, width))
        levels = levels_below(schedule.to(sigma), sigma)
        # One after the other: a pass is no larger than the caller's batch.
        rewards = torch.stack([self._rollout(number, first, levels, context) for number in range(self.rollouts)])
        if not self.soft:
            return rewards.mean(0)
        return ((self.strength * rewards).logsumexp(0) - math.log(self.rollouts)) / self.strength

    def _rollout(self, number: int, first: Prediction, levels: Tensor, context: Prompted) -> Tensor:
        latents, prediction = first.latents, first
        for step, following in enumerate(levels[1:]):
            if step > 0:
                prediction = context.denoiser(latents, levels[step])
            transition = self.kernel(prediction, following)
            latents = transition.mean
            if bool((transition.std > 0).any()):
                latents = transition.sample(self._noise(number, step, levels[0], latents))
        return self._rate(latents, context)

    def _noise(self, rollout: int, step: int, sigma: Tensor, latents: Tensor) -> Tensor:
        """Standard normal like ``latents``, equal in rows whose rollouts start from the same ``sigma``."""
        keys = [round(level * 1e6) for level in sigma.tolist()]
        rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        seeds = [stream_seed(self.seed, rollout, step, key) for key in rows]
        noise = seeded_noise(seeds, tuple(latents.shape[1:]), latents.device)
        return noise[[rows[key] for key in keys]].to(latents)

    def _rate(self, latents: Tensor, context: Prompted) -> Tensor:
        return self.reward.rate(context.denoiser.backbone.decode_latents(latents), context.reward_condition)
