"""Flow-GRPO (Liu et al. 2025) and its fast variants: policy gradient on the steps of a stochastic sampler.

Within a window of steps the sampler draws, elsewhere it follows the ODE; samples of one prompt are compared with their
group's mean, and what led to the better ones is made more likely. ``stop`` reads the value before the end, as
everywhere.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor

from stitchvm.core import (
    ConfigError,
    Cps,
    Experience,
    Kernel,
    Rows,
    Sde,
    StopWindow,
    TrainProblem,
    Transition,
    Update,
    as_sigma,
    number_above,
    number_within,
    whole_from,
    with_config_errors,
)

from .training_checks import stop_window, two_steps


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class FlowGrpo:
    """Settings of Flow-GRPO; the defaults are the released full form's (48 prompts x 24, guidance 4.5).

    ``samples_per_prompt``: of a group. ``sampler``: ``sde`` (``noise_level`` 0.7) or ``cps``, whose log-probability is
    released without its variance, ``-(x - mean)^2``. ``window_size``: how many steps draw and are learnt from (None:
    all but the last); ``window_range``: the window begins uniformly so that it lies in steps ``[low, high)`` (None:
    anywhere). ``branch``: the samples of a prompt are one until the window (Flow-GRPO-Fast as published; as released
    since, it is a ``cps`` window of 3 without). ``stop`` as for the other methods. ``clip_range``: of the ratio (fast:
    1e-5). ``advantage_clip``, ``group_std``: as for ``diffusion-nft``.
    ``kl_weight``: of the steps' distance from the frozen backbone's (fast: 0). ``ratio_bound``: a step whose ratio or
    its inverse lies beyond it, or is no number, is left out and counted as ``exploded``. Log-probabilities are means
    over a latent's numbers, so that a ratio stays near 1: this guards against one that is not finite and a policy that
    has diverged; ``clip_range`` bounds an update.

    Raises :class:`ConfigError` for a value out of range.
    """

    needs_old: ClassVar[bool] = False
    training_defaults: ClassVar[dict[str, Any]] = {"inner_updates": 2}
    """Two optimiser steps on what was collected, as released (there each on half of the samples, here on all). Every
    ratio is 1 at the first: with that alone, ``clip_range`` and ``ratio_bound`` would never act."""

    samples_per_prompt: int = attrs.field(default=24, validator=whole_from(2))
    sampler: Literal["sde", "cps"] = attrs.field(default="sde", validator=attrs.validators.in_(("sde", "cps")))
    noise_level: float = attrs.field(default=0.7, validator=number_above(0))
    window_size: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_from(1)))
    window_range: tuple[int, int] | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(two_steps("a window's first step and the one after its last", (0, 5))),
    )
    branch: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    stop: StopWindow | None = attrs.field(default=None, validator=stop_window)
    clip_range: float = attrs.field(default=1e-4, validator=number_above(0))
    advantage_clip: float = attrs.field(default=5.0, validator=number_above(0))
    group_std: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    kl_weight: float = attrs.field(default=0.04, validator=number_within(0))
    ratio_bound: float = attrs.field(default=10.0, validator=number_above(1))

    def __attrs_post_init__(self) -> None:
        if self.window_range is not None and self.window_size is None:
            raise ConfigError("window_range is where a window of window_size steps may lie; give window_size too.")
        if self.sampler == "cps" and self.noise_level > 1:
            raise ConfigError(f"noise_level is {self.noise_level}; give a cps sampler a number above 0, at most 1.")

    def kernel(self) -> Kernel:
        """What draws in the window."""
        return Sde("grpo", self.noise_level) if self.sampler == "sde" else Cps(self.noise_level)

    def check(self, problem: TrainProblem) -> None:
        """The window must fit wherever a rollout stops."""
        for stop in problem.stops(self.stop):
            self._range(problem, stop)

    def _range(self, problem: TrainProblem, stop: int) -> tuple[int, int, int]:
        """Where the window may begin and must have ended, and its size; :class:`ConfigError` where it does not fit the
        steps before the stop."""
        end = stop if stop < problem.steps else stop - 1  # the last step to the clean latent is never drawn
        size = end if self.window_size is None else self.window_size
        low, high = self.window_range or (0, end)
        if not 0 <= low < high <= end or high - low < size:
            raise ConfigError(
                f"a window of {size} steps in [{low}, {high}) does not fit the {end} steps that can draw where a "
                f"rollout stops after {stop} of {problem.steps}."
            )
        return low, high, size

    def window(self, problem: TrainProblem, update: Update, stop: int) -> tuple[int, int]:
        """First step that draws in this update, and the one after the last.

        Raises :class:`ConfigError` for a window that does not fit the steps before the stop.
        """
        low, high, size = self._range(problem, stop)
        start = torch.randint(low, high - size + 1, (), generator=problem.generator(update, 2))
        return int(start), int(start) + size

    @torch.no_grad()
    def collect(self, problem: TrainProblem, update: Update) -> Experience:
        """Every drawn step of every sample: where it began, where it led, how likely that was, and its advantage."""
        stop, network = problem.stop_step(self.stop, update), problem.policy.backbone
        first, end = self.window(problem, update, stop)
        owners, count = problem.owners(update, self.samples_per_prompt), self.samples_per_prompt
        latents = problem.noise(problem.seeds(update, count, 0))
        if self.branch:
            shared = problem.rollout(network, latents[::count], owners[::count], first)
            latents = shared.repeat_interleave(count, 0)
        else:
            latents = problem.rollout(network, latents, owners, first)
        drawn: dict[str, list[Tensor]] = {name: [] for name in ("before", "after", "log_prob", "step", "sample")}
        for step in range(first, end):
            noise = problem.noise(problem.seeds(update, count, 3 + step))
            after, likelihood = self._draw(problem, latents, owners, step, noise)
            entries = (latents, after, likelihood, torch.full_like(owners, step), torch.arange(len(owners)))
            for name, entry in zip(drawn, entries, strict=True):
                drawn[name].append(entry.cpu())
            latents = after
        latents = problem.rollout(network, latents, owners, stop, start=end)
        values = problem.values(latents, owners, stop, network)
        advantages = problem.advantages(values, count, group_std=self.group_std).cpu()
        rows = {name: torch.cat(entries) for name, entries in drawn.items()}
        clip = self.advantage_clip
        found = Experience({"advantage": advantages.clamp(-clip, clip)}, owners, rows,
                           {"stop": float(stop), "value": float(values.nanmean())})  # fmt: skip
        return found.kept(advantages.isfinite()[rows["sample"]])

    def _draw(
        self, problem: TrainProblem, latents: Tensor, owners: Tensor, step: int, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What one step draws, and its log-probability ``[S]``, in batches."""
        after, likelihood = [], []
        for rows in torch.arange(len(latents)).split(problem.batch):
            steps = torch.full((len(rows),), step)
            transition = self.transition(problem, latents[rows], steps, owners[rows])
            after.append(transition.sample(noise[rows]))
            likelihood.append(self.log_prob(transition, after[-1]))
        return torch.cat(after), torch.cat(likelihood)

    def transition(
        self, problem: TrainProblem, latents: Tensor, steps: Tensor, owners: Tensor, *, frozen: bool = False
    ) -> Transition:
        """The policy's, or the frozen backbone's, from latents ``[B, C, h, w]`` before their ``steps [B]``."""
        sigma, following = (problem.sigmas[where.to(problem.device)] for where in (steps, steps + 1))
        context = problem.context(owners, problem.reference if frozen else None)
        return self.kernel()(context.denoiser(latents, sigma), as_sigma(following, latents))

    def log_prob(self, transition: Transition, latents: Tensor) -> Tensor:
        """``[B]``: a mean over the dimensions, as released."""
        if self.sampler == "cps":
            return -(latents - transition.mean).square().flatten(1).mean(1)
        return transition.log_prob(latents) / latents[0].numel()

    def loss(self, problem: TrainProblem, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """The clipped policy-gradient loss, and the distance of the step's mean from the frozen backbone's, a row."""
        before, after, steps = rows["before"], rows["after"], rows["step"]
        transition = self.transition(problem, before, steps, rows.owners)
        change = self.log_prob(transition, after) - rows["log_prob"]
        exploded = ~(change.detach().abs() <= math.log(self.ratio_bound))  # NaN too
        ratio = change.masked_fill(exploded, 0).exp()
        losses = clipped_loss(ratio, rows["advantage"], self.clip_range).masked_fill(exploded, 0)
        figures = {"ratio": float(ratio.detach().mean()), "exploded": float(exploded.float().mean())}
        if self.kl_weight:
            with torch.no_grad():
                frozen = self.transition(problem, before, steps, rows.owners, frozen=True)
            apart = (transition.mean - frozen.mean).square().flatten(1).mean(1)
            divergence = apart / (2 * self._released_std(problem, transition, steps).square())
            losses = losses + self.kl_weight * divergence
            figures["divergence"] = float(divergence.detach().mean())
        return losses, figures

    def _released_std(self, problem: TrainProblem, transition: Transition, steps: Tensor) -> Tensor:
        """``[B]``: what the release calls ``std_dev_t`` and divides distances by. ``sde``: the noise of a unit of time,
        without the step's length; ``cps``: the step's own."""
        if self.sampler == "cps":
            return transition.std
        return transition.std / (problem.sigmas[steps] - problem.sigmas[steps + 1]).sqrt()

    def updated(self, problem: TrainProblem, number: int) -> None:
        """Nothing is left to do."""


def clipped_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """``max(-A rho, -A clip(rho, 1 - c, 1 + c))`` (PPO)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
