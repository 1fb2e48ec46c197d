"""Mistakes that only a reward can make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch.nn import functional as F

import toys
from mutant_networks import Itself
from stitchvm.core import Condition, count

REWARDS: dict[str, Callable[[], Any]] = {}


def breaks(check: str) -> Any:
    """Register a class of a broken network, or a function that makes one, for the check that must catch it."""

    def register(mutant: Any) -> Any:
        REWARDS[check] = (lambda: toys.make(mutant)) if isinstance(mutant, type) else mutant
        return mutant

    return register


@breaks("samples-apart")
class _Centred(Itself, toys.Reward):
    def exit(self, state):
        found = super().exit(state)
        return attrs.evolve(found, embedding=found.embedding - 0.5 * found.embedding.mean(0))


@breaks("orientation")
class _MirroredReward(toys.Reward):
    def grid(self, state):
        return super().grid(state).flip(3)

    def enter(self, grid, prefix, *, positions=False):
        return super().enter(grid.flip(3), prefix, positions=positions)


@breaks("declares")
def _count_from_json():
    reward = toys.make(toys.Reward)
    reward.prefix_count = 1.0
    return reward


@breaks("preprocess")
class _KeepsTheShape(toys.Reward):
    def preprocess(self, images):
        if images.ndim != 4 or images.shape[1] != 3:
            return super().preprocess(images)
        scale = self.image_size / min(images.shape[-2:])
        sides = [round(side * scale) for side in images.shape[-2:]]
        return F.interpolate(images, sides, mode="bilinear", antialias=True) * 2 - 1


@breaks("preprocess-gradient")
class _EightBits(toys.Reward):
    def preprocess(self, images):
        return super().preprocess((images * 255).round() / 255)


@breaks("wrong-images")
class _AnyImages(toys.Reward):
    def preprocess(self, images):
        return F.interpolate(images, (self.image_size,) * 2, mode="bilinear", antialias=True) * 2 - 1


@breaks("clamped")
class _Unclamped(toys.Reward):
    def judge(self, images):
        count("reward", len(images))
        return self.resume(self.head(self.preprocess(images), None, 0), 0)


@breaks("costs")
class _JudgesForFree(toys.Reward):
    def judge(self, images):
        return self.resume(self.head(self.preprocess(images.clamp(0, 1)), None, 0), 0)


@breaks("token-layout")
class _ClaimsRegisters(toys.Reward):
    prefix_count = 5


@breaks("enter")
class _PositionsUnasked(toys.Reward):
    def enter(self, grid, prefix, *, positions=False):
        return super().enter(grid, prefix, positions=positions) + self.net.positions


@breaks("tails")
class _ExitInTheStem(toys.Reward):
    @property
    def stem_modules(self):
        return (*super().stem_modules, "project")

    @property
    def exit_modules(self):
        return ("norm",)


@breaks("positions")
class _PositionsLeftBehind(toys.Reward):
    enter_modules = ()


@breaks("output")
class _PooledTokens(toys.Reward):
    def exit(self, state):
        found = super().exit(state)
        return attrs.evolve(found, tokens=found.tokens.mean(1))


@breaks("score")
class _ColumnOfScores(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition)[:, None]


@breaks("score-gradient")
class _DetachedScore(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition).detach()


@breaks("condition")
class _AcceptsNothing(toys.Reward):
    def condition(self, prompts):
        return Condition() if prompts is None else super().condition(prompts)


@breaks("wrong-condition")
class _ScoresAnyway(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition) if "text" in condition.tensors else output.embedding.mean(1)


@breaks("text")
class _ScaledByTheBatch(toys.Reward):
    def encode_prompts(self, prompts):
        return Condition({"text": super().encode_prompts(prompts)["text"] * len(prompts)})


@breaks("no-text")
class _EncodesUnread(toys.Scored):
    def encode_prompts(self, prompts):
        return toys.Reward.encode_prompts(self, prompts)


@breaks("reads-condition")
class _DeafToText(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition) * 0 + output.embedding.mean(1)


@breaks("deterministic")
class _Jitters(toys.Reward):
    draws = 0

    def preprocess(self, images):
        self.draws += 1
        return super().preprocess(images) + 1e-6 * self.draws
