"""Whether an estimator's gradient in the latent points where that of a high-budget Monte Carlo estimate does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import gradient_in
from ..costs import CostMeter
from ..errors import ConfigError, NonFiniteError
from ..estimators import Estimator, Prompted
from ..kernels import Kernel
from ..monte_carlo import MonteCarlo
from ..paths import as_sigma
from ..seeds import stream_seed
from .ranking import Trajectories
from .readings import Reading, kept, total_costs

COSINES, LENGTHS = "cosines/", "lengths"
"""Names of what is kept of a level: before an estimator's name its cosines and their cost, and the reference's."""

REFERENCE = 7
"""Names the stream of seeds of the reference's rollouts, which no estimator draws from."""


@attrs.frozen(eq=False)
class Gradients:
    """``cosines[name] [L, P, S]`` of an estimator's gradient with the reference's, the mean of ``rollouts`` rollouts of
    ``steps`` steps; ``lengths [2, L, P, S]`` the squared length of that mean and the mean squared length of a single
    rollout's gradient; ``costs`` in all."""

    cosines: dict[str, Tensor]
    lengths: Tensor
    rollouts: int
    steps: int
    costs: dict[str, dict[str, float]]
    reference_cost: dict[str, float]

    @property
    def latents(self) -> int:
        """How many latents the gradient was taken at."""
        return self.lengths[0].numel()

    @property
    def ceiling(self) -> list[float]:
        """``[L]``: about the cosine that the exact gradient would reach, the reference being noisy itself.

        The mean of ``K`` rollouts has the squared length ``m = g^2 + v / K`` and one of them ``g^2 + v``, ``v`` their
        variance: what is left of ``m`` without it gives ``g / sqrt(m)``.
        """
        mean, single = self.lengths.mean((2, 3))
        exact = (mean - (single - mean) / (self.rollouts - 1)).clamp_min(0)
        return torch.where(mean > 0, exact / mean, 0.0).sqrt().tolist()

    def reference(self) -> dict[str, Any]:
        """JSON-able: the reference's budget, ``ceiling`` by level and the cost of one of its latents."""
        return {
            "rollouts": self.rollouts, "steps": self.steps, "prompts": self.lengths.shape[2],
            "seeds": self.lengths.shape[3], "ceiling": self.ceiling,
            "cost": per_latent(self.reference_cost, self.latents),
        }  # fmt: skip


def compare_gradients(
    trajectories: Trajectories,
    estimators: Mapping[str, Estimator],
    prompts: int,
    seeds: int,
    rollouts: int,
    steps: int,
    kernel: Kernel,
    progress: bool = True,
    folder: Path | None = None,
) -> Gradients:
    """Gradients at the latents of the first ``seeds`` samples of the first ``prompts`` prompts, at each level.

    The reference's rollouts are differentiated one by one, so that memory holds the graph of one, and their noise is
    shared by the latents of a level. Levels are kept in ``folder``, which must be these settings' own, and are not read
    again. Raises as :func:`gradient_of`.
    """
    rows = (torch.arange(prompts)[:, None] * trajectories.seeds + torch.arange(seeds)).flatten()
    context, latents = trajectories.context(rows), trajectories.latents(rows)
    readings: list[Reading] = []
    of_level = rollouts + len(estimators)
    total = len(latents) * of_level
    with tqdm(total=total, desc="gradients", disable=not progress, dynamic_ncols=True, mininterval=0.5) as bar:
        for step, z in zip(trajectories.levels, latents, strict=True):
            streams = [stream_seed(trajectories.seed, REFERENCE, number, 0, 0, 0) for number in range(rollouts)]
            reference = [
                MonteCarlo(trajectories.reward, rollouts=1, steps=steps, kernel=kernel, seed=one) for one in streams
            ]
            place = (z, trajectories.grid[step].to(z), context, trajectories.batch)
            name = f"gradients-{step}"
            readings.append(kept(folder, name, partial(_read_level, reference, estimators, place, bar)))
            bar.update(len(readings) * of_level - bar.n)
    costs = {name: meter.report() for name, meter in total_costs(readings).items()}
    read = {
        name: torch.stack([one.tensors[name] for one in readings], -2).unflatten(-1, (prompts, seeds)) for name in costs
    }
    return Gradients(
        {name: read[f"{COSINES}{name}"] for name in estimators}, read[LENGTHS], rollouts, steps,
        {name: costs[f"{COSINES}{name}"] for name in estimators}, costs[LENGTHS],
    )  # fmt: skip


def _read_level(
    reference: Sequence[Estimator], estimators: Mapping[str, Estimator], place: tuple[Tensor, Tensor, Prompted, int],
    bar: tqdm[Any],
) -> Reading:  # fmt: skip
    """Each estimator's cosines ``[R]`` with the mean of the ``reference``'s gradients, and the two ``LENGTHS`` ``[2,
    R]`` of the latter, at one level's ``place``: what :func:`gradient_of` takes after an estimator."""
    costs = {name: CostMeter() for name in (LENGTHS, *(f"{COSINES}{name}" for name in estimators))}
    mean = torch.zeros(place[0].shape, dtype=torch.float64)
    single = torch.zeros(len(mean), dtype=torch.float64)
    for rollout in reference:
        with costs[LENGTHS]:
            gradient = gradient_of("the Monte Carlo reference", rollout, *place)
        mean += gradient / len(reference)
        single += gradient.square().flatten(1).sum(1) / len(reference)
        bar.update()
    found = {LENGTHS: torch.stack([mean.square().flatten(1).sum(1), single])}
    for name, estimator in estimators.items():
        with costs[f"{COSINES}{name}"]:
            gradient = gradient_of(name, estimator, *place)
        found[f"{COSINES}{name}"] = cosine(gradient, mean)
        bar.update()
    return Reading(found, costs)


def gradient_of(
    name: str, estimator: Estimator, latents: Tensor, sigma: Tensor, context: Prompted, batch: int
) -> Tensor:
    """``[R, C, h, w]`` (float64, on the CPU): the gradient of the values in ``latents [R, C, h, w]`` at one ``sigma``.

    Without a prediction to go on: one through the denoiser runs it. Raises :class:`ConfigError` for values without a
    gradient and :class:`NonFiniteError` for one that is not finite.
    """
    parts = []
    for rows in torch.arange(len(latents)).split(batch):
        z = latents[rows].detach().requires_grad_()
        with torch.enable_grad():
            values = estimator(z, as_sigma(sigma, z), context.index(rows))
            if not values.requires_grad:
                raise ConfigError(
                    f"{name} is not differentiable in the latents; leave it out, or pass gradients=False."
                )
            gradient = gradient_in(z, values, context.denoiser.backbone.dtype)
        parts.append(gradient.double().cpu())
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        raise NonFiniteError(
            f"the gradient of {name} is not finite at sigma {float(sigma):g}; leave it or this noise level out, or "
            "pass gradients=False."
        )
    return found


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """``[R]``: of each row of ``[R, ...]``, however short; 0 where one is zero, which points nowhere."""
    first, second = first.flatten(1), second.flatten(1)
    scale = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(scale > 0, (first * second).sum(1) / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def per_latent(cost: Mapping[str, float], latents: int) -> dict[str, float]:
    """A meter's report, of one latent; peak memory, which does not divide, is left out."""
    return {kind: number / latents for kind, number in cost.items() if kind != "peak_memory"}
