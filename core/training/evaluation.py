"""How good a policy's samples have become: the trained reward, and rewards that it never saw.

A reward that is trained on can be had by samples that nobody likes better. Rewards that are held out show it: while the
trained one rises, theirs fall. A score that is not finite is left out, with a warning, and is None in every report.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from ..alignment.given import reward_condition
from ..alignment.particles import initial_noise
from ..alignment.result import GRID_IMAGES, sheet, write_png
from ..backbone import Backbone
from ..comparison import mean_stderr, paired_gain
from ..conditions import Condition
from ..datasets import Judge
from ..errors import ConfigError, NonFiniteError
from ..files import make_folder
from ..joint import AnyReward, JointReward, share_of
from ..provenance import network_identity
from ..records import name_of
from ..sampling import Denoiser
from ..sampling import sample as run_sampler
from .problem import TrainProblem

Scores = Sequence[float | None]
"""One a prompt; None where there was no finite one."""


@attrs.frozen(eq=False)
class Drawn:
    """The samples of an evaluation: images ``[P, 3, H, W]`` in [0, 1], the trained reward's scores ``[P]``, and those
    of its ``parts`` where it is a sum, by name."""

    number: int
    images: Tensor
    trained: Tensor
    parts: dict[str, Tensor]


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

        Raises :class:`ConfigError` for two of one name, and for a held-out reward that is a part of the trained one.
        """
        named, judges = {name_of(reward): reward for reward in rewards}, judges or {}
        if len(named) < len(rewards) or set(named) & set(judges):
            given = [name_of(reward) for reward in rewards] + list(judges)
            twice = sorted({name for name in given if given.count(name) > 1})
            raise ConfigError(f"{', '.join(twice)} is what two evaluations would be called; give it once.")
        _check_held_out(*rewards)
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

    @torch.no_grad()
    def draw(self, problem: TrainProblem, backbone: Backbone, number: int) -> Drawn:
        """Sample ``backbone`` as it is after ``number`` updates, and rate by the trained reward; processes share it.

        Raises :class:`NonFiniteError`, in all processes, where sampling leaves the finite range in one, or no sample
        has a finite score.
        """
        trained, count = next(iter(self.rewards)), len(self.prompts)
        rows, failure = problem.own_rows(count), None
        try:
            own = self._sampled(problem, backbone, rows)
        except NonFiniteError as error:
            failure = error
        # one that stopped alone would leave the others waiting
        if bool(problem.gather(torch.tensor([float(failure is not None)], device=problem.device)).any()):
            raise NonFiniteError(
                f"the samples after update {number} left the finite range; {_advice(number)}"
            ) from failure
        pictures, scores = (problem.all_rows(each, count) for each in own[:2])
        if not bool(scores.isfinite().any()):
            raise NonFiniteError(
                f"{trained}, trained, scored no sample after update {number} with a finite number; {_advice(number)}"
            )
        return Drawn(number, pictures, scores, {name: problem.all_rows(part, count) for name, part in own[2].items()})

    def _sampled(
        self, problem: TrainProblem, backbone: Backbone, rows: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The pictures of these prompts, the trained reward's scores, and those of its parts; on the CPU."""
        trained, pictures, sums, parts = next(iter(self.rewards)), [], [], []
        for some in rows.split(problem.batch):
            condition = self.conditions.index(some).to(problem.device)
            denoiser = Denoiser(backbone, condition, problem.null, problem.guidance_scale)
            latents = run_sampler(denoiser, self.noise[some].to(problem.device), problem.sigmas)
            drawn = backbone.decode_latents(latents).clamp(0, 1)
            score, terms = _rated(self.rewards[trained], drawn, self._text(trained, some, problem.device))
            sums.append(score)
            parts.append(terms)
            pictures.append(drawn.cpu())
        return torch.cat(pictures), torch.cat(sums), {name: torch.cat([t[name] for t in parts]) for name in parts[0]}

    @torch.no_grad()
    def judge(self, problem: TrainProblem, drawn: Drawn, before: Sequence[Mapping[str, Any]]) -> Evaluation:
        """Score by all that was not trained on; warns of scores that are not finite, of a held-out reward that has
        fallen since the first evaluation while the trained one has risen, and of a trained one that has fallen from its
        best, all by more than two standard errors. ``before``: the reports of earlier evaluations. Processes share the
        rewards' work; a judge, which is given all images, is asked by each.

        Raises :class:`ConfigError` for a judge that gives anything but one score each.
        """
        trained, *held_out = self.rewards
        found = {trained: drawn.trained}
        count = len(self.prompts)
        for name in held_out:
            own = [
                self.rewards[name].rate(drawn.images[some].to(problem.device), self._text(name, some, problem.device))
                for some in problem.own_rows(count).split(problem.batch)
            ]
            found[name] = problem.all_rows(torch.cat(own).float(), count)
        found |= {name: self._judged(name, drawn.images) for name in self.judges}
        for name, scores in {**found, **drawn.parts}.items():
            if lost := int((~scores.isfinite()).sum()):
                told = f"{name} gave no finite score for {lost} of {len(scores)} samples after update {drawn.number}"
                warnings.warn(f"{told}; they are left out of its mean.", RuntimeWarning, stacklevel=2)
        return Evaluation(found, drawn.images, tuple(_fallen(found, before)) if before else (), drawn.parts)

    def _text(self, name: str, rows: Tensor, device: torch.device) -> Condition:
        text = self.texts[name]
        return text.index(rows).to(device) if len(text) else text

    def _judged(self, name: str, images: Tensor) -> Tensor:
        scores = torch.as_tensor(self.judges[name](images, list(self.prompts))).float().cpu()
        if scores.shape != (len(images),):
            raise ConfigError(
                f"judge {name!r} gave {list(scores.shape)} for {len(images)} images; give one score each."
            )
        return scores


@attrs.frozen(eq=False)
class Evaluation:
    """Scores ``[P]`` by reward, the trained one first, and the images ``[P, 3, H, W]``; ``fallen`` names the rewards
    that were warned of, ``parts`` has the scores of a trained sum's own rewards."""

    scores: dict[str, Tensor]
    images: Tensor
    fallen: tuple[str, ...]
    parts: dict[str, Tensor] = attrs.field(factory=dict)

    def report(self, number: int, record: Any) -> dict[str, Any]:
        """JSON-able: the update, what it had cost, and every reward with its mean and standard error over the finite
        scores (None where there is none); of a trained sum, its ``parts`` likewise."""
        listed = {name: _listed(scores) for name, scores in self.scores.items()}
        return {
            "update": number, "seconds": round(record.seconds, 1), "passes": dict(record.passes),
            "rewards": {name: _mean(scores) for name, scores in listed.items()}, "scores": listed,
            **({"parts": {name: _mean(_listed(t)) for name, t in self.parts.items()}} if self.parts else {}),
            "fallen": list(self.fallen),
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """A grid of the images."""
        make_folder(path.parent)
        shown = self.images[:GRID_IMAGES].nan_to_num().clamp(0, 1)
        write_png(path, sheet((shown * 255).round().byte()))


def best_of(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report whose mean of the trained reward is the highest, of equal ones the first."""
    return max(evaluations, key=lambda entry: next(iter(entry["rewards"].values()))["mean"])


def _check_held_out(trained: AnyReward, *held_out: AnyReward) -> None:
    """:class:`ConfigError` for what is trained on as a part of a sum, or sums up what is."""
    terms = _parts(trained)
    for reward in held_out:
        if shared := sorted(set(_parts(reward)) & set(terms)):
            raise ConfigError(
                f"held_out_rewards has {name_of(reward)}, but {', '.join(shared)} is trained on "
                f"({name_of(trained)}). Leave it out: every part of a trained sum is evaluated by itself."
            )


def _parts(reward: AnyReward) -> tuple[str, ...]:
    return tuple(reward.rewards) if isinstance(reward, JointReward) else (name_of(reward),)


def _rated(reward: AnyReward, images: Tensor, text: Condition) -> tuple[Tensor, dict[str, Tensor]]:
    """``reward.rate`` on the CPU, and what the parts of a sum gave, which it is then made of: each is run once."""
    if not isinstance(reward, JointReward) or len(reward.rewards) == 1:
        return reward.rate(images, text).float().cpu(), {}
    parts = {name: one.rate(images, share_of(text, (name,), unpacked=True)) for name, one in reward.rewards.items()}
    total = torch.stack([weight * parts[name] for weight, name in zip(reward.weights, parts, strict=True)]).sum(0)
    return total.float().cpu(), {name: scores.float().cpu() for name, scores in parts.items()}


def _advice(number: int) -> str:
    if number == 0:
        return "nothing is trained yet, so check the backbone, the reward, steps and guidance_scale."
    return "the training has diverged: lower the learning rate."


def _listed(scores: Tensor) -> list[float | None]:
    return [score if math.isfinite(score) else None for score in scores.tolist()]


def _mean(scores: Scores) -> dict[str, float | None]:
    finite = [score for score in scores if score is not None]
    return mean_stderr(finite).report() if finite else {"mean": None, "stderr": None}


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


def _certainty(now: Tensor, then: Scores) -> float:
    """The mean change in its standard errors, each prompt beside itself where it has both scores; 0 of fewer than two
    prompts, which tell nothing."""
    pairs = [(score, other) for score, other in zip(_listed(now), then, strict=True)
             if score is not None and other is not None]  # fmt: skip
    if len(pairs) < 2:
        return 0.0
    change = paired_gain(*zip(*pairs, strict=True))
    return 0.0 if change.stderr is None else change.mean / max(change.stderr, 1e-12)
