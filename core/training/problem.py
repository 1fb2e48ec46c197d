"""What a training method is given, :class:`TrainProblem`, and what it is, :class:`TrainingMethod`.

A method never draws from a generator that lives longer than one update: every number comes from ``(seed, update,
sample)``. So a run resumes exactly from its weights alone, and processes that share an update's prompts draw together
what one would have drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import ClassVar, Protocol, Self

import attrs
import torch
from torch import Tensor

from ..backbone import Backbone
from ..conditions import Condition
from ..errors import ConfigError, NonFiniteError
from ..estimators import Estimator, Prompted
from ..kernels import Kernel, Ode
from ..paths import Prediction, as_sigma
from ..sampling import Denoiser, seeded_noise
from ..seeds import stream_seed
from .policy import Policy

StopWindow = tuple[int, int]
"""First and last number of sampling steps, both inclusive, after which a rollout may stop."""


@attrs.frozen
class Update:
    """What one update is made of: its number, and this process's prompts.

    ``prompts`` are positions in the whole list; ``places``, positions in the update's batch over all processes, name
    their randomness.
    """

    number: int
    prompts: tuple[int, ...]
    places: tuple[int, ...]


@attrs.frozen(eq=False)
class Experience:
    """What a method learns from, on the CPU.

    ``samples``: named tensors ``[S, ...]``, one entry a sample; ``owners [S]``: the prompt of each, as its position in
    the whole list. ``rows``: named tensors ``[R, ...]``, what the loss is a mean over; ``sample [R]`` among them says
    whose they are. ``figures`` are logged.
    """

    samples: dict[str, Tensor]
    owners: Tensor
    rows: dict[str, Tensor]
    figures: dict[str, float] = attrs.field(factory=dict)

    def kept(self, rows: Tensor) -> Experience:
        """The chosen rows ``[R]`` (a mask) alone."""
        return attrs.evolve(self, rows={name: entry[rows] for name, entry in self.rows.items()})

    @classmethod
    def of_samples(cls, samples: dict[str, Tensor], owners: Tensor, figures: dict[str, float] | None = None) -> Self:
        """One row a sample."""
        return cls(samples, owners, {"sample": torch.arange(len(owners))}, figures or {})

    def __len__(self) -> int:
        return len(self.rows["sample"])

    def batches(self, size: int, device: torch.device) -> Iterator[Rows]:
        """The rows, ``size`` at a time, with their samples' tensors."""
        for start in range(0, len(self), size):
            part = {name: t[start : start + size] for name, t in self.rows.items()}
            chosen = part.pop("sample")
            tensors = {name: t[chosen] for name, t in self.samples.items()} | part
            yield Rows({name: t.to(device) for name, t in tensors.items()}, self.owners[chosen])


@attrs.frozen(eq=False)
class Rows:
    """A batch of an :class:`Experience`: named ``tensors [B, ...]``, and ``owners [B]``, the prompts."""

    tensors: dict[str, Tensor]
    owners: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self.owners)


@attrs.frozen(eq=False)
class TrainProblem:
    """What a method is given.

    ``policy`` is trained; ``old``, for a method that ``needs_old``, follows it; ``reference`` is the frozen backbone,
    whose blocks a value model's head reads. ``conditions`` and ``reward_conditions`` hold one sample a prompt of the
    whole list. ``sigmas [steps + 1]`` falls to 0. ``finished_only``: no value was given, and ``estimator`` is the clean
    reward, for the last step alone. ``batch`` bounds the samples of one network pass; ``gather`` joins
    what all processes have of a tensor; ``process`` is this one's number among
    them, and how many there are.
    """

    policy: Policy
    reference: Backbone
    estimator: Estimator
    conditions: Condition
    reward_conditions: Condition
    null: Condition
    sigmas: Tensor
    latent_shape: tuple[int, int, int]
    guidance_scale: float = 1.0
    seed: int = 0
    batch: int = 8
    old: Policy | None = None
    gather: Callable[[Tensor], Tensor] = attrs.field(default=lambda tensor: tensor)
    finished_only: bool = False
    process: tuple[int, int] = (0, 1)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def device(self) -> torch.device:
        return self.reference.device

    def context(self, owners: Tensor, backbone: Backbone | None = None) -> Prompted:
        """The context of samples of these prompts; the policy denoises unless another backbone is given."""
        chosen = owners.cpu()
        condition, text = (one.index(chosen).to(self.device) if len(one) else one
                           for one in (self.conditions, self.reward_conditions))  # fmt: skip
        network = self.policy.backbone if backbone is None else backbone
        return Prompted(Denoiser(network, condition, self.null.to(self.device), self.guidance_scale), text)

    def own_rows(self, count: int) -> Tensor:
        """This process's share of rows 0 to ``count`` that no method draws (an evaluation's), in order; all have
        equally many, the last row being dealt again where it does not go up.

        All of them, where processes share a network: they pass through it together.
        """
        if self.policy.mesh is not None:
            return torch.arange(count)
        number, processes = self.process
        each = -(-count // processes)
        return (torch.arange(each) + number * each).clamp(max=count - 1)

    def all_rows(self, own: Tensor, count: int) -> Tensor:
        """What every process has made of its :meth:`own_rows`, ``[count, ...]`` on the CPU."""
        return own.cpu() if self.policy.mesh is not None else self.gather(own.to(self.device))[:count].cpu()

    def generator(self, update: Update, *stream: int) -> torch.Generator:
        """Of what all processes draw alike in an update."""
        return torch.Generator().manual_seed(stream_seed(self.seed, update.number, 0, 0, *stream))

    def owners(self, update: Update, samples: int) -> Tensor:
        """``[P * samples]``: the prompt of each sample, those of one prompt in a row."""
        return torch.tensor(update.prompts).repeat_interleave(samples)

    def seeds(self, update: Update, samples: int, stream: int) -> Tensor:
        """``[P * samples]`` int64: a seed a sample, for :meth:`noise`."""
        return torch.tensor([
            stream_seed(self.seed, update.number, place, n, stream)
            for place in update.places for n in range(samples)
        ])  # fmt: skip

    def noise(self, seeds: Tensor) -> Tensor:
        """Standard normal latents ``[B, C, h, w]``, each from its own seed."""
        return seeded_noise([int(seed) for seed in seeds], self.latent_shape, self.device)

    def stops(self, window: StopWindow | None) -> range:
        """How many steps an update's rollouts may take: all of them, or any of the window's.

        Raises :class:`ConfigError` for a window that does not lie in ``1 .. steps``, and for one that begins before the
        last step where there is no value to be read there.
        """
        low, high = (self.steps, self.steps) if window is None else window
        if not 1 <= low <= high <= self.steps:
            raise ConfigError(
                f"stop is [{low}, {high}]; give the first and last of 1 to {self.steps} sampling steps, in order."
            )
        if self.finished_only and low < self.steps:
            raise ConfigError(
                f"stop is [{low}, {high}], before the last of {self.steps} sampling steps, and no value was given to "
                "read there: the clean reward rates finished samples alone. Give a value model (--value DIR), ask for "
                "the reward of the predicted clean sample (--estimator tweedie), or leave stop out."
            )
        return range(low, high + 1)

    def stop_step(self, window: StopWindow | None, update: Update) -> int:
        """How many steps this update's rollouts take: uniformly one of :meth:`stops`, whose errors it raises."""
        stops = self.stops(window)
        if len(stops) == 1:
            return stops[0]
        return int(torch.randint(stops.start, stops.stop, (), generator=self.generator(update, 1)))

    @torch.no_grad()
    def rollout(
        self, backbone: Backbone, latents: Tensor, owners: Tensor, stop: int, *, start: int = 0,
        kernel: Kernel | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents at ``sigmas[stop]`` of samples ``[S, C, h, w]`` that are at ``sigmas[start]``, in batches, without
        gradient."""
        kernel, parts = kernel or Ode(), []
        for rows in torch.arange(len(latents)).split(self.batch):
            context, z = self.context(owners[rows], backbone), latents[rows].to(self.device)
            for sigma, following in pairwise(self.sigmas[start : stop + 1]):
                z = kernel(context.denoiser(z, sigma), as_sigma(following, z)).mean
            parts.append(z)
        return torch.cat(parts)

    @torch.no_grad()
    def values(self, latents: Tensor, owners: Tensor, stop: int, backbone: Backbone) -> Tensor:
        """``[S]`` values of latents at ``sigmas[stop]``, in batches, without gradient; at the last step the clean
        reward, for an estimator that is exact there.

        Raises :class:`NonFiniteError` where a latent of any process is not finite.
        """
        # asked of all processes at once: one that stopped alone would leave the others waiting
        if not bool(self.gather(latents.isfinite().all()[None]).all()):
            raise NonFiniteError("a rollout left the finite range; lower the learning rate.")
        level = self.sigmas[stop]
        parts = [
            self.estimator(latents[rows], as_sigma(level, latents[rows]), self.context(owners[rows], backbone), None)
            for rows in torch.arange(len(latents)).split(self.batch)
        ]
        return torch.cat(parts).float()

    def advantages(self, values: Tensor, samples: int, *, group_std: bool = False) -> Tensor:
        """``[S]``: values less their group's mean (``samples`` of one prompt in a row), over the deviation of the whole
        update's values, or of the group's; NaN where there was no value, with a warning.

        ``(r - mean) / (std + 1e-4)``, as Flow-GRPO and DiffusionNFT released it. Raises :class:`NonFiniteError` where
        no sample of a prompt has a finite value.
        """
        values = values.masked_fill(~values.isfinite(), torch.nan)
        groups = values.view(-1, samples)
        # asked of all processes at once: one that stopped alone would leave the others waiting
        if bool(self.gather(groups.isfinite().sum(1).eq(0).any()[None]).any()):
            raise NonFiniteError("no sample of some prompt has a value that is finite.")
        if lost := int(values.isnan().sum()):
            warnings.warn(f"{lost} of {len(values)} samples have no finite value and are dropped.", RuntimeWarning,
                          stacklevel=3)  # fmt: skip
        centred = groups - groups.nanmean(1, keepdim=True)
        whole = self.gather(values)
        over_all = (whole - whole.nanmean()).square().nanmean().sqrt()
        deviation = centred.square().nanmean(1, keepdim=True).sqrt() if group_std else over_all
        return (centred / (deviation + 1e-4)).flatten()

    @torch.no_grad()
    def reference_prediction(self, latents: Tensor, sigma: Tensor, owners: Tensor) -> Prediction:
        """What the frozen backbone says of latents ``[B, C, h, w]``."""
        return self.context(owners, self.reference).denoiser(latents.detach(), sigma)


class TrainingMethod(Protocol):
    """A method: an attrs class whose fields are its settings. It takes an estimator and never asks which.

    ``samples_per_prompt`` are drawn in an update; ``needs_old``: it samples from a policy that follows the trained one.
    A method may have ``training_defaults``, a class's mapping of what it is published with of
    :class:`~stitchvm.core.TrainSettings`.
    """

    needs_old: ClassVar[bool]

    samples_per_prompt: int

    def check(self, problem: TrainProblem) -> None:
        """Raise :class:`ConfigError` for settings that some update of this problem could not follow; called before the
        first one."""
        ...

    def collect(self, problem: TrainProblem, update: Update) -> Experience:
        """What this update learns from, without gradient."""
        ...

    def loss(self, problem: TrainProblem, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """``[B]`` losses of the rows, and figures to log."""
        ...

    def updated(self, problem: TrainProblem, number: int) -> None:
        """Called after the optimiser's step of update ``number`` (from 0)."""
        ...


def spread_seed(seeds: Tensor, times: int) -> Tensor:
    """``times`` seeds from each, in a row: ``[len(seeds) * times]`` int64."""
    return torch.tensor([stream_seed(int(seed), n) for seed in seeds for n in range(times)])
