"""Value estimators behind one protocol: an aligner takes one and never asks which."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from .conditions import Condition
from .errors import ConfigError
from .joint import AnyReward, JointReward, share_of
from .paths import Prediction, as_sigma
from .records import name_of
from .reward import Reward
from .sampling import Denoiser
from .value import StitchedValue


@attrs.frozen(eq=False)
class Prompted:
    """A batch of latents' context, one sample a latent: how they are being denoised and what the reward compares
    with."""

    denoiser: Denoiser
    reward_condition: Condition

    def index(self, rows: Tensor) -> Prompted:
        """The context of the chosen samples."""
        return Prompted(self.denoiser.index(rows), self.reward_condition.index(rows))

    def repeat(self, times: int) -> Prompted:
        """The context of ``times`` particles a sample, in a row."""
        return Prompted(self.denoiser.repeat(times), self.reward_condition.repeat(times))


@runtime_checkable
class Estimator(Protocol):
    """``E[r(z0) | z_t]`` for latents ``[B, C, h, w]`` at ``sigma [B]``: ``[B]``, differentiable in the latents.

    ``prediction`` is the denoiser's at exactly these latents and noise level, when the caller already has it; an
    estimator that needs one computes it otherwise.

    An estimator that reads the denoiser's prediction says so by an attribute ``through_denoiser = True`` (one without
    it does not): its gradient needs a ``prediction`` that still has its graph, or none.
    """

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor: ...


@attrs.frozen(eq=False)
class Stitched:
    """The stitched value model: one truncated pass, no denoiser, no decoder; under the sampler's own prompt where the
    model reads it."""

    value: StitchedValue

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        prompt = context.denoiser.condition if self.value.prompted else None
        return self.value(latents, sigma, context.reward_condition, prompt=prompt)


@attrs.frozen(eq=False)
class Tweedie:
    """The reward of the decoded posterior mean, ``r(D(E[z0 | z_t]))``: needs the denoiser and the decoder, biased by
    Jensen."""

    through_denoiser: ClassVar[bool] = True

    reward: AnyReward

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        level = as_sigma(sigma, latents)
        z0 = latents if bool((level == 0).all()) else (prediction or context.denoiser(latents, level)).z0
        images = context.denoiser.backbone.decode_latents(z0)
        return self.reward.rate(images, context.reward_condition)


def _listed(estimators: Iterable[Estimator | StitchedValue]) -> tuple[Estimator, ...]:
    return tuple(Stitched(each) if isinstance(each, StitchedValue) else each for each in estimators)


def _finite(weights: Iterable[float]) -> tuple[float, ...]:
    found = tuple(float(weight) for weight in weights)
    if not all(math.isfinite(weight) for weight in found):
        raise ConfigError(f"Sum: weights are {list(found)}; give finite numbers.")
    return found


@attrs.frozen(eq=False)
class Sum:
    """``sum_k weights_k V_k``: several estimators of the same latents as one, such as a stitched value and a Tweedie.

    Parts that read the denoiser share one prediction; parts of different rewards each get what theirs compares with
    out of a condition for all (that of a :class:`JointReward`). Raises :class:`ConfigError` for no estimators, another
    number of weights, or a weight that is not finite.
    """

    estimators: tuple[Estimator, ...] = attrs.field(converter=_listed)
    weights: tuple[float, ...] = attrs.field(converter=_finite)

    def __attrs_post_init__(self) -> None:
        if not self.estimators:
            raise ConfigError("Sum: no estimators were given; name at least one.")
        if len(self.weights) != len(self.estimators):
            raise ConfigError(
                f"Sum: {len(self.estimators)} estimators but {len(self.weights)} weights; give one an estimator, in "
                "their order."
            )

    @property
    def through_denoiser(self) -> bool:
        """Whether any part reads the denoiser's prediction."""
        return self._readers() > 0

    def _readers(self) -> int:
        return sum(bool(getattr(estimator, "through_denoiser", False)) for estimator in self.estimators)

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        level = as_sigma(sigma, latents)
        if prediction is None and self._readers() > 1 and bool((level > 0).any()):
            prediction = context.denoiser(latents, level)
        terms = zip(self.weights, self.estimators, strict=True)
        return torch.stack([
            weight * part(latents, level, _context_of(part, context), prediction) for weight, part in terms
        ]).sum(0)  # fmt: skip


def _context_of(part: Estimator, context: Prompted) -> Prompted:
    """The context with what the part's own rewards compare with alone; all of it where they are not known."""
    if isinstance(part, Stitched):
        own = share_of(context.reward_condition, part.value.names, unpacked=len(part.value.names) == 1)
    elif isinstance(reward := getattr(part, "reward", None), JointReward):
        own = share_of(context.reward_condition, tuple(reward.rewards))
    elif isinstance(reward, Reward):
        own = share_of(context.reward_condition, (name_of(reward),), unpacked=True)
    else:
        return context
    return attrs.evolve(context, reward_condition=own)


@torch.no_grad()
def clean_reward(latents: Tensor, context: Prompted, reward: AnyReward) -> tuple[Tensor, Tensor]:
    """The final reward ``[B]`` of clean latents and the images ``[B, 3, H, W]`` in [0, 1] it was read from."""
    images = context.denoiser.backbone.decode_latents(latents).clamp(0, 1)
    return reward.rate(images, context.reward_condition), images
