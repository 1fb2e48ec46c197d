"""How good a policy's samples have become: the trained reward, and rewards that it never saw.

A reward that is trained on can be had by samples that nobody likes better. Rewards that are held out show it: while the
trained one rises, theirs fall.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from .alignment import reward_condition
from .alignment_result import GRID_IMAGES, sheet, write_png
from .backbone import Backbone
from .comparison import mean_stderr, paired_gain
from .conditions import Condition
from .datasets import Judge
from .errors import ConfigError
from .files import make_folder
from .joint import AnyReward
from .loading import name_of
from .particles import initial_noise
from .provenance import network_identity
from .sampling import Denoiser
from .sampling import sample as run_sampler
from .training_problem import TrainProblem


@attrs.frozen(eq=False)
class Gallery:
    """The prompts that are always sampled from the same noise, and what judges them; the first reward is trained on."""

    prompts: tuple[str, ...]
    noise: Tensor
    conditions: Condition
    rewards: dict[str, AnyReward]
    texts: dict[str, Condition]
    judges: Mapping[str, Judge] = attrs.field(factory=dict)

    @classmethod
    def of(
        cls, problem: TrainProblem, prompts: Sequence[str], rewards: Sequence[AnyReward],
        judges: Mapping[str, Judge] | None = None,
    ) -> Self:  # fmt: skip
        """By the rewards' own names; ``judges`` of finished images come after them.

        Raises :class:`ConfigError` for two of one name.
        """
        named, judges = {name_of(reward): reward for reward in rewards}, judges or {}
        if len(named) < len(rewards) or set(named) & set(judges):
            given = [name_of(reward) for reward in rewards] + list(judges)
            twice = sorted({name for name in given if given.count(name) > 1})
            raise ConfigError(f"{', '.join(twice)} is what two evaluations would be called; give it once.")
        noise = initial_noise(problem.seed, range(len(prompts)), 1, problem.latent_shape).flatten(0, 1)
        texts = {name: reward_condition(reward, prompts) for name, reward in named.items()}
        conditions = problem.reference.encode_prompts(list(prompts))
        return cls(tuple(prompts), noise, conditions, named, texts, judges)

    def identities(self) -> dict[str, Any]:
        """Which rewards these are, JSON-able."""
        return {name: network_identity(reward) for name, reward in self.rewards.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is evaluated, the trained reward first."""
        return (*self.rewards, *self.judges)

    def _judged(self, name: str, images: Tensor) -> Tensor:
        scores = torch.as_tensor(self.judges[name](images, list(self.prompts))).float().cpu()
        if scores.shape != (len(images),):
            raise ConfigError(
                f"judge {name!r} gave {list(scores.shape)} for {len(images)} images; give one score each."
            )
        return scores

    @torch.no_grad()
    def evaluate(self, problem: TrainProblem, backbone: Backbone, before: Sequence[Mapping[str, Any]]) -> Evaluation:
        """Sample ``backbone`` and judge; warns of a held-out reward that has fallen since the first evaluation while
        the trained one has risen, and of a trained one that has fallen from its best, all by more than two standard
        errors. ``before``: the reports of earlier evaluations."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.rewards}
        pictures = []
        for rows in torch.arange(len(self.prompts)).split(problem.batch):
            condition = self.conditions.index(rows).to(problem.device)
            denoiser = Denoiser(backbone, condition, problem.null, problem.guidance_scale)
            latents = run_sampler(denoiser, self.noise[rows].to(problem.device), problem.sigmas)
            drawn = backbone.decode_latents(latents).clamp(0, 1)
            for name, reward in self.rewards.items():
                text = self.texts[name]
                chosen = text.index(rows).to(problem.device) if len(text) else text
                parts[name].append(reward.rate(drawn, chosen).float().cpu())
            pictures.append(drawn.cpu())
        images = torch.cat(pictures)
        found = {name: torch.cat(scores) for name, scores in parts.items()}
        found |= {name: self._judged(name, images) for name in self.judges}
        return Evaluation(found, images, tuple(_fallen(found, before)) if before else ())


@attrs.frozen(eq=False)
class Evaluation:
    """Scores ``[P]`` by reward, the trained one first, and the images ``[P, 3, H, W]``; ``fallen`` names the rewards
    that were warned of."""

    scores: dict[str, Tensor]
    images: Tensor
    fallen: tuple[str, ...]

    def report(self, number: int, record: Any) -> dict[str, Any]:
        """JSON-able: the update, what it had cost, and every reward with its mean and standard error."""
        return {
            "update": number, "seconds": round(record.seconds, 1), "passes": dict(record.passes),
            "rewards": {name: mean_stderr(scores.tolist()).report() for name, scores in self.scores.items()},
            "scores": {name: scores.tolist() for name, scores in self.scores.items()},
            "fallen": list(self.fallen),
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """A grid of the images."""
        make_folder(path.parent)
        write_png(path, sheet((self.images[:GRID_IMAGES].clamp(0, 1) * 255).round().byte()))


def best_of(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report whose mean of the trained reward is the highest, of equal ones the first."""
    return max(evaluations, key=lambda entry: next(iter(entry["rewards"].values()))["mean"])


def _fallen(now: Mapping[str, Tensor], before: Sequence[Mapping[str, Any]]) -> list[str]:
    """The trained reward where it fell from its best, and held-out ones that fell while it rose; warns of each."""
    trained, *held_out = now
    best = best_of(before)
    fallen = [trained] if _certainty(now[trained], best["scores"][trained]) < -2 else []
    if fallen:
        warnings.warn(f"{trained}, trained, fell from what it was after update {best['update']}, whose weights are in "
                      "best.", RuntimeWarning, stacklevel=3)  # fmt: skip
    first = before[0]["scores"]
    if _certainty(now[trained], first[trained]) > 2:
        hacked = [name for name in held_out if _certainty(now[name], first[name]) < -2]
        if hacked:
            warnings.warn(f"{' and '.join(hacked)}, held out, fell while the trained reward rose: reward hacking?",
                          RuntimeWarning, stacklevel=3)  # fmt: skip
        fallen += hacked
    return fallen


def _certainty(now: Tensor, then: Sequence[float]) -> float:
    """The mean change in its standard errors, each prompt beside itself; 0 of a single prompt, which tells nothing."""
    change = paired_gain(now, then)
    return 0.0 if change.stderr is None else change.mean / max(change.stderr, 1e-12)
