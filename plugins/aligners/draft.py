"""Direct reward fine-tuning: the value's gradient through the sampler's last steps (paper, section 6).

One class for what differs in two numbers: DRaFT-K (Clark et al. 2024: ``backward_steps`` K), DRaFT-LV (``renoised``),
AlignProp (Prabhudesai et al. 2024: ``truncation``) and ReFL (Xu et al. 2023: ``backward_steps=0`` and ``stop``
with Tweedie's estimate, whose own denoiser pass carries the gradient). With ``stop`` and a stitched value it is the
paper's early-stopped form: ``V(z_tau)`` instead of the clean reward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from stitchvm.core import (
    ConfigError,
    Experience,
    Ode,
    Prompted,
    Rows,
    StopWindow,
    TrainProblem,
    Update,
    as_sigma,
    number_within,
    spread,
    spread_seed,
    whole_from,
    with_config_errors,
)

from .training_checks import stop_window

optional_count: Any = attrs.validators.optional(whole_from(0))


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class Draft:
    """Settings of DRaFT and its relatives.

    ``samples_per_prompt``: of an update. ``stop``: the first and last number of steps after which to stop and read the
    value, uniformly, one an update (None: run to the end). ``backward_steps``: how many of the last steps before that
    carry the gradient (None: all; 0: none, for an estimator that reads the denoiser). ``truncation``: ``random`` draws
    that number uniformly from 1 to ``backward_steps`` (None: to the stop) every update, ``gaussian`` the step that they
    begin at, around 0.84 of the way to the stop, give or take 0.1 of it (AlignProp's released 42 and 5 of 50).
    ``renoised``: average the gradient over so many samples that are noised again for one step (DRaFT-LV, 2; 0: not).
    ``regularisation``: weight of the mean squared difference from the frozen backbone's velocity at the steps with
    gradient, or in the estimator's own pass where none has. ``margin``: lower the loss no further where the value is
    above it (ReFL: 2).

    Raises :class:`ConfigError` for a setting out of range, ``renoised`` with other than one backward step, and
    drawn ``truncation`` of fewer than two; :meth:`loss` for a value without a gradient.
    """

    needs_old: ClassVar[bool] = False
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5, "weight_decay": 0.0}
    """The paper's."""

    samples_per_prompt: int = attrs.field(default=1, validator=whole_from(1))
    stop: StopWindow | None = attrs.field(default=None, validator=stop_window)
    backward_steps: int | None = attrs.field(default=1, validator=optional_count)
    truncation: Literal["fixed", "random", "gaussian"] = attrs.field(
        default="fixed", validator=attrs.validators.in_(("fixed", "random", "gaussian"))
    )
    renoised: int = attrs.field(default=0, validator=whole_from(0))
    regularisation: float = attrs.field(default=0.01, validator=number_within(0))
    margin: float | None = attrs.field(default=None, validator=attrs.validators.optional(number_within(-math.inf)))

    def __attrs_post_init__(self) -> None:
        if self.renoised and self.backward_steps != 1:
            raise ConfigError(f"renoised is {self.renoised}: it repeats the last step; set backward_steps to 1.")
        if self.truncation != "fixed" and self.backward_steps in (0, 1):
            raise ConfigError(
                f"truncation is {self.truncation}, but backward_steps is {self.backward_steps}, of which nothing can "
                "be drawn; give more, or null for any number."
            )

    def check(self, problem: TrainProblem) -> None:
        """Where no step has a gradient, the estimator must, wherever a rollout stops."""
        last, through = problem.stops(self.stop)[-1], bool(getattr(problem.estimator, "through_denoiser", False))
        if self.backward_steps == 0 and not (through and last < problem.steps):
            raise ConfigError(
                "backward_steps is 0, so that the gradient has only the estimator's own denoiser pass to go through; "
                f"give an estimator that has one (tweedie) and a window to stop in before step {problem.steps}, the "
                "last."
            )

    def collect(self, problem: TrainProblem, update: Update) -> Experience:
        """Which noise to start from, where to stop, and from where on to keep the gradient."""
        stop = problem.stop_step(self.stop, update)
        owners = problem.owners(update, self.samples_per_prompt)
        first = stop - self._depth(problem, update, stop)
        samples = {
            "seed": problem.seeds(update, self.samples_per_prompt, 0),
            "stop": torch.full_like(owners, stop), "first": torch.full_like(owners, first),
        }  # fmt: skip
        return Experience.of_samples(samples, owners, {"stop": float(stop)})

    def _depth(self, problem: TrainProblem, update: Update, stop: int) -> int:
        """How many steps carry the gradient."""
        most = stop if self.backward_steps is None else min(self.backward_steps, stop)
        draws = problem.generator(update, 2)
        if self.truncation == "fixed" or most == 1:
            return most
        if self.truncation == "random":
            return int(torch.randint(1, most + 1, (), generator=draws))
        first = 0
        while not 1 <= first < stop:  # as released: until it is one of the steps, and not the first
            first = round(stop * (0.84 + 0.1 * float(torch.randn((), generator=draws))))
        return min(stop - first, most)

    def loss(self, problem: TrainProblem, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """``-V(z_tau)`` and the regularisation, a row."""
        stop, first = int(rows["stop"][0]), int(rows["first"][0])
        latents = problem.rollout(problem.policy.backbone, problem.noise(rows["seed"]), rows.owners, first)
        starts = self._noised_again(problem, latents, rows, first, stop) if self.renoised else [latents]
        found = [self._ahead(problem, start, rows.owners, first, stop) for start in starts]
        losses, values, distances = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
        return losses, {"value": float(values.detach().mean()), "distance": float(distances.detach().mean())}

    def _ahead(
        self, problem: TrainProblem, latents: Tensor, owners: Tensor, first: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, value and distance ``[B]`` of the steps with gradient, from latents before step ``first``."""
        context, distance = problem.context(owners), latents.new_zeros(len(latents))
        for step in range(first, stop):
            latents, away = _step(problem, context, latents, owners, step, self.regularisation > 0)
            distance = distance + away / max(stop - first, 1)
        level, prediction = as_sigma(problem.sigmas[stop], latents), None
        if first == stop and self.regularisation > 0:
            prediction = context.denoiser(latents, level)
            distance = prediction.distance(problem.reference_prediction(latents, level, owners))
        value = problem.estimator(latents, level, context, prediction)
        _check_differentiable(value, problem.estimator)
        gain = -value if self.margin is None else F.relu(self.margin - value)
        return gain + self.regularisation * distance, value, distance

    def _noised_again(
        self, problem: TrainProblem, latents: Tensor, rows: Rows, first: int, stop: int
    ) -> Iterator[Tensor]:
        """Each sample ``renoised`` times, one time after the other: taken the last step, and back by fresh noise."""
        clean = problem.rollout(problem.policy.backbone, latents, rows.owners, stop, start=first)
        level, back = (as_sigma(problem.sigmas[step], clean) for step in (stop, first))
        weight, std = problem.reference.path.transfer(level, back)
        seeds = spread_seed(rows["seed"], self.renoised)
        for time in range(self.renoised):
            fresh = problem.noise(seeds[time :: self.renoised])
            yield spread(weight, clean) * clean + spread(std, clean) * fresh

    def updated(self, problem: TrainProblem, number: int) -> None:
        """Nothing is left to do."""


def _check_differentiable(value: Tensor, estimator: object) -> None:
    """:class:`ConfigError` for a value that tells the policy nothing: the regularisation alone would go on to give the
    loss a graph."""
    if value.requires_grad or not torch.is_grad_enabled():
        return
    name = getattr(estimator, "__name__", type(estimator).__name__)
    raise ConfigError(
        f"draft climbs the value's gradient, and the estimator {name} gives a value without one; give an estimator and "
        "a reward that are differentiable in the latents, or train with diffusion-nft, diffusion-dpo or flow-grpo, "
        "which need no gradient."
    )


def _step(
    problem: TrainProblem, context: Prompted, latents: Tensor, owners: Tensor, step: int, regularised: bool
) -> tuple[Tensor, Tensor]:
    """One step with its gradient, and its distance ``[B]`` from the frozen backbone's."""
    prediction = context.denoiser(latents, problem.sigmas[step])
    following = Ode()(prediction, as_sigma(problem.sigmas[step + 1], latents)).mean
    if not regularised:
        return following, latents.new_zeros(len(latents))
    return following, prediction.distance(problem.reference_prediction(latents, prediction.sigma, owners))
