"""Mistakes that an alignment method can make, each around the toy method's own ``run``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count as counter
from typing import Any

import attrs
import torch

import toys
from stitchvm.core import ConfigError

ALIGNERS: dict[str, Callable[[], Any]] = {}


def _aligner(check: str) -> Any:
    """Register a function ``(run, settings, problem) -> particles`` around the toy method's own ``run``."""

    def register(spoilt: Any) -> Any:
        class Mutant(toys.Aligner):
            def run(self, problem):
                return spoilt(super().run, self, problem)

        ALIGNERS[check] = attrs.frozen(kw_only=True)(Mutant)
        return spoilt

    return register


def _weighted(run, method, problem, values):
    """As the toy method, with other values."""
    found = run(problem)
    return attrs.evolve(found, log_weights=(method.strength * values(found, problem)).log_softmax(1))


def _values(found, problem):
    flat = found.latents.flatten(0, 1)
    return problem.estimate(flat, flat.new_zeros(())).view_as(found.rewards)


@attrs.frozen(kw_only=True)
class _NotForJson(toys.Aligner):
    steps: set[int] = attrs.field(factory=lambda: {1, 2})


ALIGNERS["settings"] = _NotForJson


@attrs.frozen(kw_only=True)
class _AnySetting(toys.Aligner):
    schedule: Any = "linear"


ALIGNERS["wrong-settings"] = _AnySetting


@_aligner("particles-shape")
def _real_ancestry(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, ancestry=found.ancestry.float())


@_aligner("normalised-weights")
def _unnormalised(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, log_weights=found.log_weights - 1)


@_aligner("clean-rewards")
def _values_as_rewards(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, rewards=found.rewards + 0.5)


@_aligner("images")
def _images_in_another_order(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, images=found.images.flip(1))


_RUNS = counter(1)


@_aligner("same-seed")
def _drifts(run, method, problem):
    return run(attrs.evolve(problem, noise=problem.noise * (1 + 1e-7 * next(_RUNS))))


@_aligner("other-seed")
def _own_noise(run, method, problem):
    own = torch.randn(problem.noise[:1].shape, generator=torch.Generator().manual_seed(0)).expand_as(problem.noise)
    return run(attrs.evolve(problem, noise=own.where(problem.noise.isfinite(), problem.noise)))


@_aligner("global-randomness")
def _seeds_the_process(run, method, problem):
    torch.manual_seed(0)
    return run(problem)


@_aligner("any-batch-size")
def _strength_by_batch(run, method, problem):
    return _weighted(run, method, problem, lambda found, problem: _values(found, problem) * problem.batch / 64)


@_aligner("bounded-passes")
def _all_at_once(run, method, problem):
    return run(attrs.evolve(problem, batch=1_000_000))


@_aligner("prompts-apart")
def _scaled_by_all_prompts(run, method, problem):
    def values(found, problem):
        each = _values(found, problem)
        return each * each.abs().mean()

    return _weighted(run, method, problem, values)


@_aligner("counted-passes")
def _uncounted_pass(run, method, problem):
    backbone, condition = problem.backbone, problem.context.denoiser.condition.index([0])
    backbone.resume(backbone.head(backbone.noisy(problem.noise[0, :1], 0.5), condition, 0), 0)
    return run(problem)


@_aligner("progress")
def _silent(run, method, problem):
    return run(attrs.evolve(problem, progress=lambda share: None))


@_aligner("nothing-changed")
def _overwrites_noise(run, method, problem):
    found = run(problem)
    problem.noise.zero_()
    return found


@_aligner("knows-nothing")
def _standardised(run, method, problem):
    def values(found, problem):
        each = _values(found, problem)
        return (each - each.mean(1, keepdim=True)) / each.std(1, correction=0, keepdim=True)

    return _weighted(run, method, problem, values)


@_aligner("any-number-of-particles")
def _always_four(run, method, problem):
    if problem.particles != 4:
        raise ConfigError("four particles, please.")
    return run(problem)


@_aligner("asks-for-a-value")
def _runs_without_a_value(run, method, problem):
    return problem.unweighted(problem.sample()) if problem.estimator is None else run(problem)


@_aligner("follows-the-value")
def _ignores_the_value(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, log_weights=torch.zeros_like(found.log_weights).log_softmax(1))


@_aligner("value-not-finite")
def _hides_what_is_not_finite(run, method, problem):
    estimator = problem.estimator

    def finite(*given):
        return estimator(*given).nan_to_num()

    return run(attrs.evolve(problem, estimator=None if estimator is None else finite))


@_aligner("noise-not-finite")
def _mends_noise(run, method, problem):
    return run(attrs.evolve(problem, noise=problem.noise.nan_to_num(posinf=0.0)))
