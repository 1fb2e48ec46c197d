"""How much of a reward's skill survives on noisy latents, each reward measured by its own metric (paper, section 4).

What is measured on comes from a dataset plugin: captioned images, pairs of a preferred and a rejected picture, or rated
images (:mod:`stitchvm.core.datasets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from .backbone import Backbone
from .conditions import Condition
from .datasets import offering
from .errors import ConfigError
from .evaluation import SIGMAS, Readings, Retrieval, embedding, over_sigmas, retrieval
from .metrics import centred_similarity, metric_of, preference_accuracy, recall_by_chance, share_kept, spearman
from .records import MetricKind
from .reward import Reward, RewardOutput
from .value import StitchedValue


@attrs.frozen
class Skill:
    """One metric by noise level: of the clean reward on images, and of value models on noisy latents.

    ``chance`` is what a value that knows nothing reaches, where that is a number; ``count`` the images or pairs.
    """

    metric: MetricKind
    sigmas: tuple[float, ...]
    clean: float
    models: dict[str, tuple[float, ...]]
    count: int
    chance: float | None

    def retention(self, name: str) -> list[float | None]:
        """A model's skill as a share of the clean reward's, by noise level: the plain ratio, as the paper has it.

        Chance is not subtracted: a preference of 0.5 keeps half of a perfect one. None where the clean reward has no
        skill to keep.
        """
        return share_kept(self.models[name], self.clean)

    def report(self) -> dict[str, Any]:
        """JSON-able: ``metric``, ``sigma[]``, ``clean``, a list by model, and ``retention`` with a list by model."""
        return {
            "metric": self.metric, "sigma": list(self.sigmas), "clean": self.clean,
            **{name: list(values) for name, values in self.models.items()},
            "retention": {name: self.retention(name) for name in self.models},
            "chance": self.chance, "count": self.count,
        }  # fmt: skip

    @classmethod
    def of(cls, found: Retrieval, captions: Sequence[str]) -> Skill:
        """Both directions' mean of a retrieval among images with these captions."""
        models = {name: tuple(recall.mean for recall in recalls) for name, recalls in found.models.items()}
        return cls("recall", found.sigmas, found.clean.mean, models, found.count, recall_by_chance(captions))


@attrs.frozen(eq=False)
class SkillData:
    """What one metric is measured on, and, from the ``train`` split, the kind of pictures to prepare for it on.

    ``pictures``: one set ``[N, 3, H, W]`` uint8, or the preferred and the rejected one; ``prompts``: ``N`` captions or
    prompts, none where nothing reads them; ``ratings [N]`` for rank.
    """

    metric: MetricKind
    pictures: tuple[Tensor, ...]
    prompts: list[str] = attrs.field(factory=list)
    ratings: Tensor | None = None

    @classmethod
    def draw(cls, metric: MetricKind, dataset: Any, count: int, seed: int = 0, split: str = "test") -> SkillData:
        """``count`` images or pairs of a dataset plugin.

        Raises :class:`ConfigError` for a dataset that does not offer what the metric needs.
        """
        needed = f"the metric {metric!r}"
        if metric == "preference":
            pairs = offering(dataset, "preferences", needed).preferences(split, count, seed)
            return cls(metric, (pairs.preferred, pairs.rejected), pairs.prompts)
        if metric == "rank":
            rated = offering(dataset, "rated", needed).rated(split, count, seed)
            return cls(metric, (rated.images,), ratings=rated.ratings)
        captioned = offering(dataset, "captioned", needed).captioned(split, count, seed)
        return cls(metric, (captioned.images,), captioned.captions)

    def unlabelled(self) -> Tensor:
        """All pictures ``[N * sets, 3, H, W]`` in one set, a pair's two side by side."""
        return torch.stack(self.pictures, 1).flatten(0, 1)

    def measure(
        self,
        backbone: Backbone,
        reward: Reward,
        models: Mapping[str, StitchedValue],
        *,
        sigmas: Sequence[float] = SIGMAS,
        batch: int = 64,
        seed: int = 0,
        progress: bool = True,
    ) -> Skill:
        """The reward on clean images, and every value model on their latents noised to every sigma.

        Picture ``n``'s noise comes from ``(seed, n)``, that of a pair's rejected one from ``(seed, n, 1)``. Raises
        :class:`ConfigError` for a reward that is not measured by this metric.
        """
        if metric_of(reward) != self.metric:
            raise ConfigError(
                f"these pictures measure {self.metric}, but the reward's metric is {metric_of(reward)}; draw others."
            )
        options: dict[str, Any] = {"sigmas": tuple(sigmas), "batch": batch, "seed": seed, "progress": progress}
        if self.metric == "recall":
            return Skill.of(self.retrieval(backbone, reward, models, **options), self.prompts)
        measured = _Measured.of(self, reward)
        clean, found = over_sigmas(
            backbone, reward, models, self.pictures, measured.read, measured, label=self.metric, **options
        )
        chance = {"preference": 0.5, "rank": 0.0}.get(self.metric)
        return Skill(self.metric, tuple(sigmas), clean, found, len(self.pictures[0]), chance)

    def retrieval(
        self, backbone: Backbone, reward: Reward, models: Mapping[str, StitchedValue], **options: Any
    ) -> Retrieval:
        """Recall in both directions; ``options`` as for :meth:`measure`."""
        return retrieval(backbone, reward, dict(models), self.pictures[0].float() / 255, self.prompts, **options)


@attrs.frozen(eq=False)
class _Measured:
    """How a metric reads a network's output, and what it makes of all the readings at one noise level."""

    held: SkillData
    condition: Condition

    @classmethod
    @torch.no_grad()
    def of(cls, held: SkillData, reward: Reward) -> _Measured:
        prompted = held.metric == "preference" and reward.condition_kind == "prompts"
        return cls(held, reward.condition(held.prompts) if prompted else Condition())

    def read(self, scorer: Reward, output: RewardOutput, rows: slice) -> Tensor:
        """``[B]`` scores, or ``[B, D]`` embeddings for similarity."""
        if self.held.metric == "similarity":
            return embedding(scorer, output, rows)
        return scorer.score(output, self.condition.index(rows).to(output.embedding.device))

    def __call__(self, readings: Readings, clean: Readings) -> float:
        if self.held.metric == "preference":
            return preference_accuracy(*readings)
        if self.held.metric == "rank":
            assert self.held.ratings is not None
            return float(spearman(readings[0][None], self.held.ratings[None]))
        return centred_similarity(readings[0], clean[0])
