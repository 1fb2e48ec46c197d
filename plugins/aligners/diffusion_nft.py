"""DiffusionNFT (Zheng et al. 2025): the forward process pulled towards good samples and pushed away from bad ones.

Samples of the old policy are noised again, and the policy's prediction is regressed so that mixtures of it with the
old one meet the sample, the good mixture by the sample's reward ``r`` in [0, 1], the bad one by ``1 - r``. With
``stop`` it is the paper's early-stopped form (section 6): the rollout ends at ``z_tau``, ``V(z_tau)`` rates it, and the
regression is to the anchor ``z_tau`` instead of the clean sample; at ``tau = 0`` both are one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from stitchvm.core import (
    Experience,
    Prediction,
    Rows,
    StopWindow,
    TrainProblem,
    Update,
    number_above,
    number_within,
    spread_seed,
    whole_from,
    with_config_errors,
)

from .anchors import levels_above, noised_again, velocity_errors
from .training_checks import stop_window

SMALLEST_ERROR = 1e-5
"""Below this the self-normalising weight stays as it is, as released."""


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class DiffusionNft:
    """Settings of DiffusionNFT; the defaults are the released ones (SD 3.5 Medium, several rewards: ``mix_beta`` 0.1).

    ``samples_per_prompt``: of a group. ``stop``: the first and last number of steps after which to stop and read the
    value, uniformly, one an update (None: run to the end). ``levels``: at how many of the sampler's noise levels above
    the stop each sample is noised again (None: all). ``mix_beta``: the policy's share in the good mixture
    (``config.beta``). ``kl_weight``: of the squared distance from the frozen backbone's velocity (``train.beta``).
    ``advantage_clip``: of the standardised rewards. ``group_std``: standardise by the group's own deviation instead of
    that of the whole update. ``regression``: ``self-normalised`` errors of the anchor, or plain ones of the velocity.
    ``old_decay``, ``old_decay_rate`` and ``old_decay_start``: after update ``n`` the old policy keeps ``min(rate (n -
    start), old_decay)`` of itself, nothing before ``start``; 0 is on policy.

    Raises :class:`ConfigError` for a value out of range.
    """

    needs_old: ClassVar[bool] = True

    samples_per_prompt: int = attrs.field(default=24, validator=whole_from(2))
    stop: StopWindow | None = attrs.field(default=None, validator=stop_window)
    levels: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_from(1)))
    mix_beta: float = attrs.field(default=1.0, validator=number_above(0))
    kl_weight: float = attrs.field(default=1e-4, validator=number_within(0))
    advantage_clip: float = attrs.field(default=5.0, validator=number_above(0))
    group_std: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    regression: Literal["self-normalised", "velocity"] = attrs.field(
        default="self-normalised", validator=attrs.validators.in_(("self-normalised", "velocity"))
    )
    old_decay: float = attrs.field(default=0.5, validator=number_within(0, 1))
    old_decay_rate: float = attrs.field(default=0.001, validator=number_within(0))
    old_decay_start: int = attrs.field(default=0, validator=whole_from(0))

    def check(self, problem: TrainProblem) -> None:
        """The stopping window must be one of the sampler's steps."""
        problem.stops(self.stop)

    @torch.no_grad()
    def collect(self, problem: TrainProblem, update: Update) -> Experience:
        """Samples of the old policy where they stop, how good each is beside its group, and what noise to read it
        under."""
        assert problem.old is not None
        stop, sampler = problem.stop_step(self.stop, update), problem.old.backbone
        owners = problem.owners(update, self.samples_per_prompt)
        noise = problem.noise(problem.seeds(update, self.samples_per_prompt, 0))
        anchors = problem.rollout(sampler, noise, owners, stop)
        values = problem.values(anchors, owners, stop, sampler)
        advantages = problem.advantages(values, self.samples_per_prompt, group_std=self.group_std)
        clip = self.advantage_clip
        optimality = advantages.clamp(-clip, clip) / clip / 2 + 0.5
        levels = levels_above(problem, update, self.samples_per_prompt, stop, self.levels)
        count = levels.shape[1]
        samples = {"anchor": anchors.cpu(), "optimality": optimality.cpu(),
                   "tau": problem.sigmas[stop].expand(len(owners)).cpu()}  # fmt: skip
        rows = {"sample": torch.arange(len(owners)).repeat_interleave(count), "sigma": levels.flatten(),
                "seed": spread_seed(problem.seeds(update, self.samples_per_prompt, 1), count)}  # fmt: skip
        found = Experience(samples, owners, rows, {"stop": float(stop), "value": float(values.nanmean())})
        return found.kept(optimality.isfinite().cpu()[rows["sample"]])

    def loss(self, problem: TrainProblem, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """The regression to the anchor in both mixtures, and the distance from the frozen backbone, a row."""
        assert problem.old is not None
        sigma, tau, anchor = rows["sigma"], rows["tau"], rows["anchor"]
        latents = noised_again(problem, anchor, tau, sigma, rows["seed"])
        ours = problem.context(rows.owners).denoiser(latents, sigma)
        with torch.no_grad():
            old = problem.context(rows.owners, problem.old.backbone).denoiser(latents, sigma)
        losses = nft_loss(self, ours, old, anchor, tau, rows["optimality"])
        distance = losses.new_zeros(len(losses))
        if self.kl_weight:
            distance = ours.distance(problem.reference_prediction(latents, sigma, rows.owners))
        figures = {"distance": float(distance.detach().mean())} if self.kl_weight else {}
        return losses + self.kl_weight * distance, figures

    def updated(self, problem: TrainProblem, number: int) -> None:
        """The old policy follows."""
        assert problem.old is not None
        keep = min(max(self.old_decay_rate * (number + 1 - self.old_decay_start), 0.0), self.old_decay)
        problem.old.follow(problem.policy, keep)


def nft_loss(
    settings: DiffusionNft, ours: Prediction, old: Prediction, anchor: Tensor, tau: Tensor, optimality: Tensor
) -> Tensor:
    """``[B]``: ``(r L+ + (1 - r) L-) advantage_clip / mix_beta`` (eq. of the implicit policies, released scale).

    ``L+-`` are the errors of ``a+ = b a + (1 - b) a_old`` and ``a- = (1 + b) a_old - b a``, ``a`` the anchor that a
    prediction expects. Self-normalised: squared, over their mean absolute value held constant.
    """
    beta = settings.mix_beta
    expected, before = ours.anchor(tau), old.anchor(tau)
    good = beta * expected + (1 - beta) * before - anchor
    bad = (1 + beta) * before - beta * expected - anchor
    if settings.regression == "velocity":
        errors = [velocity_errors(ours, one, tau) for one in (good, bad)]
    else:
        errors = [_self_normalised(one) for one in (good, bad)]
    mixed = optimality * errors[0] + (1 - optimality) * errors[1]
    return mixed * settings.advantage_clip / beta


def _self_normalised(error: Tensor) -> Tensor:
    scale = error.detach().double().abs().flatten(1).mean(1).clamp_min(SMALLEST_ERROR)
    return error.square().flatten(1).mean(1) / scale.to(error)
