"""Does a value rank the seeds of one prompt as their final rewards will? That is what steering needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..alignment.given import reward_condition
from ..backbone import Backbone
from ..comparison import mean_stderr
from ..costs import CostMeter
from ..datasets import Judge
from ..errors import ConfigError
from ..estimators import Estimator, Prompted, clean_reward
from ..joint import AnyReward, GivenReward, load_judge
from ..kernels import Kernel, Ode, Transition
from ..loading import load_backbone
from ..metrics import spearman
from ..paths import Prediction
from ..progress import track
from ..sampling import Denoiser, guided, sample, seeded_noise
from ..seeds import stream_seed
from .readings import Reading, kept, total_costs

SIGMAS = (0.9, 0.75, 0.5, 0.25, 0.1)

GENERATION, REWARDS, VALUES, JUDGED = "generation", "rewards", "values/", "judged/"
"""Names of what is kept of a batch: what the trajectories themselves cost; their rewards; before an estimator's name
its values and their cost, before a judge's what it says."""


@attrs.frozen(eq=False)
class Ranking:
    """Within-prompt Spearman correlation of each estimator with the final reward.

    ``requested`` noise levels and the ``sigmas`` of the steps closest to them; ``rewards [P, S]``; ``values[name] [L,
    P, S]``; ``costs[name]`` of the estimator alone, the trajectory's own prediction being free; ``generation`` of the
    trajectories; ``judged[name] [P, S]``, what others say of the finished pictures.
    """

    requested: tuple[float, ...]
    sigmas: tuple[float, ...]
    rewards: Tensor
    values: dict[str, Tensor]
    costs: dict[str, dict[str, float]]
    generation: dict[str, float]
    judged: dict[str, Tensor] = attrs.field(factory=dict)

    @property
    def ranked(self) -> Tensor:
        """``[P]`` bool: prompts whose seeds have different rewards; the others are left out of every mean."""
        return differing(self.rewards)

    def correlations(self, name: str) -> Tensor:
        """``[L, prompts]``: one coefficient a level and a ranked prompt."""
        return _ranks(self.values[name], self.rewards)

    def judged_correlations(self, name: str, judge: str) -> Tensor:
        """``[L, prompts]``: of an estimator with what ``judge`` says, prompts it says the same of all of left out."""
        return _ranks(self.values[name], self.judged[judge])

    def reward_correlations(self, judge: str) -> Tensor:
        """``[prompts]``: of the final rewards themselves, which is what an exact value could have at the end."""
        return _ranks(self.rewards[None], self.judged[judge])[0]

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


def differing(outcomes: Tensor) -> Tensor:
    """``[P]`` bool: the rows of ``[P, S]`` that are not the same number all along."""
    return outcomes.amax(1) > outcomes.amin(1)


def _ranks(values: Tensor, outcomes: Tensor) -> Tensor:
    """``[L, prompts]`` of ``values [L, P, S]`` and ``outcomes [P, S]``, of the prompts whose outcomes differ."""
    kept = differing(outcomes)
    return torch.stack([spearman(level[kept], outcomes[kept]) for level in values])


def closest_steps(sigmas: Tensor, requested: Sequence[float]) -> list[int]:
    """For each requested level the step whose noise level is closest; the last level, 0, is no step."""
    return [int((sigmas[:-1] - level).abs().argmin()) for level in requested]


def rank_seeds(
    backbone: str | Backbone,
    estimators: Mapping[str, Estimator],
    reward: GivenReward,
    prompts: Sequence[str],
    *,
    seeds: int = 12,
    steps: int = 28,
    guidance_scale: float | None = None,
    embedded_guidance: float | None = None,
    sigmas: Sequence[float] = SIGMAS,
    resolution: int | None = None,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> Ranking:
    """Follow ``seeds`` plain ODE samples of every prompt and read each estimator on the way.

    An estimator is given the trajectory's prediction, as when steering. The noise is that of ``align`` with the same
    ``seed``; ``guidance_scale`` and ``embedded_guidance`` are, too. Raises :class:`ConfigError` for fewer than two
    seeds or no prompt, and when no prompt's rewards differ.
    """
    network, scale = guided(load_backbone(backbone), guidance_scale, embedded_guidance)
    trajectories = Trajectories(
        backbone=network, reward=load_judge(reward, network.device), prompts=tuple(prompts), seeds=seeds, steps=steps,
        guidance_scale=scale, sigmas=tuple(sigmas), resolution=resolution, seed=seed,
        batch=batch,
    )  # fmt: skip
    return trajectories.follow(estimators, "ranking", progress)


@attrs.frozen(eq=False)
class OwnNoise:
    """``kernel`` with its noise drawn already, each row's from a generator of its own (on the CPU): no noise is left in
    its transitions, and a sample does not depend on what it shares a batch with."""

    kernel: Kernel
    generators: Sequence[torch.Generator]

    def __call__(self, prediction: Prediction, sigma_next: Tensor) -> Transition:
        transition = self.kernel(prediction, sigma_next)
        if not bool((transition.std > 0).any()):
            return transition
        shape = transition.mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
        return Transition(transition.sample(noise.to(transition.mean)), torch.zeros_like(transition.std))


@attrs.frozen(eq=False, kw_only=True)
class Trajectories:
    """``seeds`` samples of every prompt as the generator draws them, and the steps closest to the noise levels
    ``sigmas``, where they are read.

    Row ``prompt * seeds + n`` starts from the noise of particle ``n`` in ``align`` with the same ``seed``; the noise of
    ``kernel`` is each row's own. Raises :class:`ConfigError` for fewer than two seeds or no prompt.
    """

    backbone: Backbone
    reward: AnyReward
    prompts: tuple[str, ...]
    seeds: int
    steps: int
    guidance_scale: float
    sigmas: tuple[float, ...]
    resolution: int | None = None
    seed: int = 0
    batch: int = 64
    kernel: Kernel = attrs.field(factory=Ode)

    def __attrs_post_init__(self) -> None:
        if self.seeds < 2 or not self.prompts:
            counts = f"{len(self.prompts)} and {self.seeds}"
            raise ConfigError(f"ranking needs at least one prompt and two seeds, got {counts}.")

    @property
    def side(self) -> int:
        """Of the latents."""
        return (self.resolution or self.backbone.native_resolution) // self.backbone.latent_factor

    @cached_property
    def grid(self) -> Tensor:
        """``[steps + 1]`` falling noise levels."""
        return self.backbone.sigmas(self.steps, (self.side, self.side))

    @property
    def levels(self) -> list[int]:
        """The step that is read for each of ``sigmas``."""
        return closest_steps(self.grid, self.sigmas)

    @cached_property
    def contexts(self) -> Prompted:
        """One sample a prompt."""
        device = self.backbone.device
        with torch.no_grad():
            condition = self.backbone.encode_prompts(list(self.prompts)).to(device)
            null = self.backbone.null_condition().to(device)
            compared = reward_condition(self.reward, self.prompts).to(device)
        return Prompted(Denoiser(self.backbone, condition, null, self.guidance_scale), compared)

    def context(self, rows: Tensor) -> Prompted:
        """One sample a row."""
        return self.contexts.index(rows // self.seeds)

    def noise(self, rows: Tensor) -> Tensor:
        """What the rows start from, ``[R, C, h, w]``."""
        shape = (self.backbone.latent_channels, self.side, self.side)
        seeds = [stream_seed(self.seed, row // self.seeds, row % self.seeds) for row in rows.tolist()]
        return seeded_noise(seeds, shape, self.backbone.device)

    def own_kernel(self, rows: Tensor) -> OwnNoise:
        """The kernel of the rows' transitions, from its start."""
        # Four numbers: no stream of fewer, such as an initial noise or a Monte Carlo rollout's, is ever the same.
        streams = ((row // self.seeds, row % self.seeds, 0, 0) for row in rows.tolist())
        generators = [torch.Generator().manual_seed(stream_seed(self.seed, *stream)) for stream in streams]
        return OwnNoise(self.kernel, generators)

    def follow(
        self, estimators: Mapping[str, Estimator], label: str, progress: bool = True,
        judges: Mapping[str, Judge] | None = None, folder: Path | None = None,
    ) -> Ranking:  # fmt: skip
        """Read each estimator along every sample, and have ``judges`` judge the pictures beside the reward.

        Batches are kept in ``folder``, which must be these settings' own, and are not read again. Raises
        :class:`ConfigError` when no prompt's rewards differ.
        """
        judges, rows = judges or {}, torch.arange(len(self.prompts) * self.seeds)
        readings = []
        for part in track(rows.split(self.batch), label, -(-len(rows) // self.batch), progress):
            name = f"rows-{int(part[0])}-{int(part[-1])}"
            readings.append(kept(folder, name, partial(self._read, part, estimators, judges)))
        result = self._ranking(readings, estimators, judges)
        if not bool(result.ranked.any()):
            raise ConfigError("no prompt's seeds differ in their reward, so there is nothing to rank.")
        return result

    @torch.no_grad()
    def _read(self, rows: Tensor, estimators: Mapping[str, Estimator], judges: Mapping[str, Judge]) -> Reading:
        """``rewards [R]``, ``values/NAME [L, R]`` and ``judged/NAME [R]`` of these rows' trajectories."""
        values: dict[tuple[str, int], Tensor] = {}
        costs = {name: CostMeter() for name in estimators}
        generation, context = CostMeter(), self.context(rows)

        def look(step: int, latents: Tensor, prediction: Prediction) -> None:
            if step in self.levels:
                for name, estimator in estimators.items():
                    with costs[name]:
                        values[name, step] = estimator(latents, prediction.sigma, context, prediction).float().cpu()

        with generation:
            noise = self.noise(rows)
            clean = sample(
                context.denoiser, noise, self.grid.to(noise.device), kernel=self.own_kernel(rows), callback=look
            )
            rewards, images = clean_reward(clean, context, self.reward)
        for meter in costs.values():
            generation.passes.subtract(meter.passes)
            generation.seconds -= meter.seconds
        images = images.cpu()  # as where trainings are judged
        prompts = [self.prompts[row // self.seeds] for row in rows.tolist()]
        tensors = {REWARDS: rewards.float().cpu()}
        tensors |= {f"{VALUES}{name}": torch.stack([values[name, step] for step in self.levels]) for name in estimators}
        tensors |= {
            f"{JUDGED}{name}": torch.as_tensor(judge(images, prompts)).float().cpu() for name, judge in judges.items()
        }
        return Reading(tensors, {GENERATION: generation, **{f"{VALUES}{name}": meter for name, meter in costs.items()}})

    def _ranking(self, readings: Sequence[Reading], estimators: Iterable[str], judges: Iterable[str]) -> Ranking:
        """All batches together."""
        found = {
            name: torch.cat([reading.tensors[name] for reading in readings], -1).unflatten(-1, (-1, self.seeds))
            for name in readings[0].tensors
        }
        costs = {name: meter.report() for name, meter in total_costs(readings).items()}
        return Ranking(
            self.sigmas, tuple(float(self.grid[step]) for step in self.levels), found[REWARDS],
            {name: found[f"{VALUES}{name}"] for name in estimators},
            {name: costs[f"{VALUES}{name}"] for name in estimators}, costs[GENERATION],
            {name: found[f"{JUDGED}{name}"] for name in judges},
        )  # fmt: skip

    def latents(self, rows: Tensor) -> Tensor:
        """``[L, R, C, h, w]``: what :meth:`follow` reads of these rows at each level."""
        parts = []
        for part in rows.split(self.batch):
            seen: dict[int, Tensor] = {}

            def keep(step: int, latents: Tensor, prediction: Prediction, seen: dict[int, Tensor] = seen) -> None:
                if step in self.levels:
                    seen[step] = latents

            noise, context = self.noise(part), self.context(part)
            grid = self.grid.to(noise.device)
            sample(context.denoiser, noise, grid, kernel=self.own_kernel(part), callback=keep)
            parts.append(torch.stack([seen[step] for step in self.levels]))
        return torch.cat(parts, 1)
