"""Does a value rank the seeds of one prompt as their final rewards will? That is what steering needs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from .alignment import reward_condition
from .backbone import Backbone
from .comparison import mean_stderr
from .costs import CostMeter
from .errors import ConfigError
from .estimators import Estimator, Prompted, clean_reward
from .joint import AnyReward, load_judge
from .loading import load_backbone
from .metrics import spearman
from .particles import initial_noise
from .paths import Prediction
from .progress import track
from .sampling import Denoiser, sample

SIGMAS = (0.9, 0.75, 0.5, 0.25, 0.1)


@attrs.frozen(eq=False)
class Ranking:
    """Within-prompt Spearman correlation of each estimator with the final reward.

    ``requested`` noise levels and the ``sigmas`` of the steps closest to them; ``rewards [P, S]``; ``values[name] [L,
    P, S]``; ``costs[name]`` of the estimator alone, the trajectory's own prediction being free; ``generation`` of the
    trajectories.
    """

    requested: tuple[float, ...]
    sigmas: tuple[float, ...]
    rewards: Tensor
    values: dict[str, Tensor]
    costs: dict[str, dict[str, float]]
    generation: dict[str, float]

    @property
    def ranked(self) -> Tensor:
        """``[P]`` bool: prompts whose seeds have different rewards; the others are left out of every mean."""
        return self.rewards.amax(1) > self.rewards.amin(1)

    def correlations(self, name: str) -> Tensor:
        """``[L, prompts]``: one coefficient a level and a ranked prompt."""
        rewards = self.rewards[self.ranked]
        return torch.stack([spearman(values[self.ranked], rewards) for values in self.values[name]])

    def report(self) -> dict[str, Any]:
        """JSON-able: ``sigma[]``, each estimator's means over prompts, their standard errors, costs and counts."""
        found = {name: [mean_stderr(level.tolist()) for level in self.correlations(name)] for name in self.values}
        means = {name: [level.mean for level in levels] for name, levels in found.items()}
        errors = {name: [level.stderr for level in levels] for name, levels in found.items()}
        return {
            "sigma": list(self.sigmas), **means, "stderr": errors, "requested": list(self.requested),
            "prompts": int(self.ranked.sum()), "constant_prompts": int((~self.ranked).sum()),
            "seeds": self.rewards.shape[1], "cost": self.costs, "generation": self.generation,
        }  # fmt: skip


def closest_steps(sigmas: Tensor, requested: Sequence[float]) -> list[int]:
    """For each requested level the step whose noise level is closest; the last level, 0, is no step."""
    return [int((sigmas[:-1] - level).abs().argmin()) for level in requested]


@torch.no_grad()
def rank_seeds(
    backbone: str | Backbone,
    estimators: Mapping[str, Estimator],
    reward: str | AnyReward,
    prompts: Sequence[str],
    *,
    seeds: int = 12,
    steps: int = 28,
    guidance_scale: float = 3.0,
    sigmas: Sequence[float] = SIGMAS,
    resolution: int | None = None,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> Ranking:
    """Follow ``seeds`` plain ODE samples of every prompt and read each estimator on the way.

    An estimator is given the trajectory's prediction, as when steering. The noise is that of ``align`` with the same
    ``seed``. Raises :class:`ConfigError` for fewer than two seeds or no prompt, and when no prompt's rewards differ.
    """
    if seeds < 2 or not prompts:
        raise ConfigError(f"ranking needs at least one prompt and two seeds, got {len(prompts)} and {seeds}.")
    network, judge = load_backbone(backbone), load_judge(reward)
    side = (resolution or network.native_resolution) // network.latent_factor
    shape = (network.latent_channels, side, side)
    grid = network.sigmas(steps, (side, side))
    reader = _Reader(dict(estimators), judge, grid, closest_steps(grid, sigmas))
    context = _context(network, judge, prompts, guidance_scale)
    rows = torch.arange(len(prompts) * seeds)
    for part in track(rows.split(batch), "ranking", -(-len(rows) // batch), progress):
        owners = part // seeds
        first = int(owners[0])
        noise = initial_noise(seed, range(first, int(owners[-1]) + 1), seeds, shape).flatten(0, 1)
        reader.read(noise[part - first * seeds].to(network.device), context.index(owners))
    result = reader.result(tuple(sigmas), seeds)
    if not bool(result.ranked.any()):
        raise ConfigError("no prompt's seeds differ in their reward, so there is nothing to rank.")
    return result


def _context(backbone: Backbone, reward: AnyReward, prompts: Sequence[str], guidance_scale: float) -> Prompted:
    """One sample a prompt."""
    condition = backbone.encode_prompts(list(prompts)).to(backbone.device)
    denoiser = Denoiser(backbone, condition, backbone.null_condition().to(backbone.device), guidance_scale)
    return Prompted(denoiser, reward_condition(reward, prompts).to(backbone.device))


@attrs.define(eq=False)
class _Reader:
    """Reads estimators along trajectories and collects what it read, batch by batch."""

    estimators: dict[str, Estimator]
    reward: AnyReward
    grid: Tensor
    levels: list[int]
    rewards: list[Tensor] = attrs.field(factory=list)
    values: list[dict[tuple[str, int], Tensor]] = attrs.field(factory=list)
    costs: dict[str, CostMeter] = attrs.field(factory=dict)
    generation: CostMeter = attrs.field(factory=CostMeter)

    def read(self, noise: Tensor, context: Prompted) -> None:
        """One batch of trajectories from ``noise [B, C, h, w]``."""
        read: dict[tuple[str, int], Tensor] = {}

        def look(step: int, latents: Tensor, prediction: Prediction) -> None:
            if step in self.levels:
                for name, estimator in self.estimators.items():
                    with self.costs.setdefault(name, CostMeter()):
                        read[name, step] = estimator(latents, prediction.sigma, context, prediction).float().cpu()

        with self.generation:
            clean = sample(context.denoiser, noise, self.grid.to(noise.device), callback=look)
            rewards, _ = clean_reward(clean, context, self.reward)
        self.rewards.append(rewards.float().cpu())
        self.values.append(read)

    def result(self, requested: tuple[float, ...], seeds: int) -> Ranking:
        """All batches together; what the estimators cost is taken out of the generation's cost."""
        values = {
            name: torch.stack([torch.cat([read[name, step] for read in self.values]) for step in self.levels])
            for name in self.estimators
        }
        for meter in self.costs.values():
            self.generation.passes.subtract(meter.passes)
            self.generation.seconds -= meter.seconds
        return Ranking(
            requested, tuple(float(self.grid[step]) for step in self.levels),
            torch.cat(self.rewards).unflatten(0, (-1, seeds)),
            {name: table.unflatten(1, (-1, seeds)) for name, table in values.items()},
            {name: meter.report() for name, meter in self.costs.items()}, self.generation.report(),
        )  # fmt: skip
