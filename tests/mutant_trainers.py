"""Mistakes that a method which trains can make, each around the toy method's own ``collect`` or ``loss``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count as counter
from typing import Any, ClassVar

import attrs
import torch

import toys

TRAINERS: dict[str, Callable[[], Any]] = {}


def _collects(check: str) -> Any:
    """Register a function ``(collect, problem, update) -> experience`` around the toy method's own ``collect``."""

    def register(spoilt: Any) -> Any:
        class Mutant(toys.Trainer):
            def collect(self, problem, update):
                return spoilt(super().collect, problem, update)

        TRAINERS[check] = attrs.frozen(kw_only=True)(Mutant)
        return spoilt

    return register


def _loses(check: str) -> Any:
    """Register a function ``(losses, problem, rows) -> losses`` of the toy method's own."""

    def register(spoilt: Any) -> Any:
        class Mutant(toys.Trainer):
            def loss(self, problem, rows):
                losses, figures = super().loss(problem, rows)
                return spoilt(losses, problem, rows), figures

        TRAINERS[check] = attrs.frozen(kw_only=True)(Mutant)
        return spoilt

    return register


def _weighted(found, advantage):
    return attrs.evolve(found, samples={**found.samples, "advantage": advantage})


@attrs.frozen(kw_only=True)
class _NotForJson(toys.Trainer):
    levels: set[int] = attrs.field(factory=lambda: {1, 2})


TRAINERS["settings"] = _NotForJson


@attrs.frozen(kw_only=True)
class _AnySetting(toys.Trainer):
    schedule: Any = "linear"


TRAINERS["wrong-settings"] = _AnySetting


@attrs.frozen(kw_only=True)
class _NumbersItsPolicies(toys.Trainer):
    needs_old: ClassVar[int] = 1


TRAINERS["declares"] = _NumbersItsPolicies


@_collects("experience")
def _counts_its_own_prompts(collect, problem, update):
    found = collect(problem, update)
    return attrs.evolve(found, owners=torch.arange(len(found.owners)) // 4)


@_loses("losses")
def _in_a_column(losses, problem, rows):
    return losses[:, None]


@_loses("networks-kept")
def _old_policy_follows_too_early(losses, problem, rows):
    problem.old.follow(problem.policy, 0.5)
    return losses


_RUNS = counter(1)


@_collects("same-update")
def _drifts(collect, problem, update):
    found = collect(problem, update)
    return attrs.evolve(found, samples={**found.samples, "clean": found.samples["clean"] * (1 + 1e-7 * next(_RUNS))})


@_collects("other-update")
def _the_first_update_for_ever(collect, problem, update):
    return collect(problem, attrs.evolve(update, number=0))


@_loses("any-batch-size")
def _beside_those_of_the_batch(losses, problem, rows):
    return losses * (1 + rows["advantage"].abs().mean())


@_collects("bounded-passes")
def _all_at_once(collect, problem, update):
    return collect(attrs.evolve(problem, batch=1_000_000), update)


@_loses("counted-passes")
def _uncounted_pass(losses, problem, rows):
    backbone, condition = problem.reference, problem.conditions.index(rows.owners)
    backbone.resume(backbone.head(backbone.noisy(rows["clean"], 0.5), condition, 0), 0)
    return losses


@_collects("shared-update")
def _numbers_its_own_places(collect, problem, update):
    return collect(problem, attrs.evolve(update, places=tuple(range(len(update.places)))))


@_collects("global-randomness")
def _seeds_the_process(collect, problem, update):
    torch.manual_seed(0)
    return collect(problem, update)


@_collects("knows-nothing")
def _standardised(collect, problem, update):
    found = collect(problem, update)
    groups = found.samples["advantage"].view(-1, 4)
    return _weighted(found, (groups / groups.std(1, keepdim=True)).flatten())


@_collects("follows-the-value")
def _ignores_the_value(collect, problem, update):
    found = collect(problem, update)
    return _weighted(found, torch.ones_like(found.samples["advantage"]))


@_collects("value-not-finite")
def _hides_what_is_not_finite(collect, problem, update):
    estimator = problem.estimator

    def finite(*given):
        return estimator(*given).nan_to_num()

    return collect(attrs.evolve(problem, estimator=finite), update)
