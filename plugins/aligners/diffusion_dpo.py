"""Online Diffusion-DPO (Wallace et al. 2024, eq. 14): of a prompt's samples the value prefers one to another.

The published method learns from a collection of people's choices. Here the pairs are the policy's own samples of this
update, the best and the worst of each prompt by the value. With ``stop`` the rollouts end at ``z_tau`` and ``V(z_tau)``
chooses; the errors compared are those of the velocity that leads to the anchor ``z_tau``.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from stitchvm.core import (
    Experience,
    Rows,
    StopWindow,
    TrainProblem,
    Update,
    number_above,
    spread_seed,
    whole_from,
    with_config_errors,
)

from .anchors import levels_above, noised_again, velocity_errors
from .training_checks import stop_window


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class DiffusionDpo:
    """Settings of online Diffusion-DPO.

    ``samples_per_prompt``: the best and the worst of so many are a pair. ``stop``: the first and last number of steps
    after which to stop and read the value, uniformly, one an update (None: run to the end). ``levels``: at how many of
    the sampler's noise levels above the stop a pair is noised, both alike (None: all). ``beta``: how strongly the
    policy is held to the frozen backbone, for errors that are means over a latent's numbers (released: 2000 for
    SD 1.5, 5000 for SDXL).

    Raises :class:`ConfigError` for a value out of range.
    """

    needs_old: ClassVar[bool] = False

    samples_per_prompt: int = attrs.field(default=8, validator=whole_from(2))
    stop: StopWindow | None = attrs.field(default=None, validator=stop_window)
    levels: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_from(1)))
    beta: float = attrs.field(default=2000.0, validator=number_above(0))

    def check(self, problem: TrainProblem) -> None:
        """The stopping window must be one of the sampler's steps."""
        problem.stops(self.stop)

    @torch.no_grad()
    def collect(self, problem: TrainProblem, update: Update) -> Experience:
        """Samples where they stop, with the worst of their prompt as rival, and rows of the best alone: what noise to
        compare it with its rival under. Where all are alike to the value, one is its own rival and teaches nothing."""
        stop, sampler, each = problem.stop_step(self.stop, update), problem.policy.backbone, self.samples_per_prompt
        owners = problem.owners(update, each)
        anchors = problem.rollout(sampler, problem.noise(problem.seeds(update, each, 0)), owners, stop)
        values = problem.values(anchors, owners, stop, sampler)
        order = problem.advantages(values, each).view(-1, each)
        best, worst = order.nan_to_num(nan=-torch.inf).argmax(1), order.nan_to_num(nan=torch.inf).argmin(1)
        first = each * torch.arange(len(order), device=order.device)  # of a prompt's samples
        samples = {"anchor": anchors.cpu(), "rival": anchors[first + worst].repeat_interleave(each, 0).cpu(),
                   "tau": problem.sigmas[stop].expand(len(owners)).cpu()}  # fmt: skip
        levels = levels_above(problem, update, 1, stop, self.levels)
        times = levels.shape[1]
        rows = {"sample": (first + best).cpu().repeat_interleave(times), "sigma": levels.flatten(),
                "seed": spread_seed(problem.seeds(update, 1, 1), times)}  # fmt: skip
        figures = {"stop": float(stop), "value": float(values.nanmean())}
        return Experience(samples, owners, rows, figures)

    def loss(self, problem: TrainProblem, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """``-log sigmoid(-beta / 2 (gain of the winner - gain of the loser))``, a gain being by how much the policy's
        error exceeds the frozen backbone's, a pair and noise level."""
        winner, loser = (self._excess(problem, rows, name) for name in ("anchor", "rival"))
        margin = -self.beta / 2 * (winner - loser)
        return -F.logsigmoid(margin), {"accuracy": float((margin.detach() > 0).float().mean())}

    def _excess(self, problem: TrainProblem, rows: Rows, name: str) -> Tensor:
        anchor, tau, sigma = rows[name], rows["tau"], rows["sigma"]
        latents = noised_again(problem, anchor, tau, sigma, rows["seed"])
        ours = problem.context(rows.owners).denoiser(latents, sigma)
        theirs = problem.reference_prediction(latents, sigma, rows.owners)
        errors = [velocity_errors(each, each.anchor(tau) - anchor, tau) for each in (ours, theirs)]
        return errors[0] - errors[1]

    def updated(self, problem: TrainProblem, number: int) -> None:
        """Nothing is left to do."""
