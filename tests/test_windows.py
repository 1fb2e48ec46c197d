"""Which steps of a schedule a method acts in: fractions of the steps, step numbers or noise levels."""

from __future__ import annotations

import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward
from problems import problem
from stitchvm.core import ConfigError, load_aligner, steps_at, steps_within


def method(name, **settings):
    return load_aligner(name)(**settings)


def test_places_of_steps_in_all_units():
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert steps_within(sigmas, (0.2, 0.6)) == [1, 2, 3]
    assert steps_within(sigmas, (0.2, 0.6), include_end=False) == [1, 2]
    assert steps_within(sigmas, (1, 3), "step") == [1, 2, 3]
    assert steps_within(sigmas, (0.0, 1.0), include_end=False) == [0, 1, 2, 3, 4]
    assert steps_within(sigmas, (0.4, 0.8), "sigma") == [1, 2, 3]
    # Left out is the end that is reached last: of levels the lower one.
    assert steps_within(sigmas, (0.4, 0.8), "sigma", include_end=False) == [1, 2]
    assert steps_at(sigmas, (0.85, 0.41), "sigma") == [1, 3]
    assert steps_at(sigmas, (4, 0), "step") == [0, 4]
    assert steps_at(sigmas, (0.4, 1.0)) == [2, 4]


@pytest.mark.parametrize(
    "choose",
    [lambda s: steps_within(s, (2, 7), "step"), lambda s: steps_within(s, (0.5, 1.5), "sigma"),
     lambda s: steps_at(s, (5,), "step"), lambda s: steps_at(s, (-0.1,))],
)  # fmt: skip
def test_steps_that_are_not_there_are_refused(choose):
    with pytest.raises(ConfigError, match="there is no step at"):
        choose(torch.linspace(1, 0, 6))


def test_resampling_happens_where_it_is_told():
    task = problem(GaussianBackbone(), LinearReward(), ExactValue(GaussianBackbone(), LinearReward()))
    looks = method("fk-steering", resample_at=(0.9, 0.42), unit="sigma").run(task).history
    assert [look.step for look in looks] == [1, 7]
    with pytest.raises(ConfigError, match="there is no step at step 30 of 12 steps"):
        method("fk-steering", window=(0, 30), unit="step").run(task)


def run(name, steps=12, **settings):
    """The exact value's calls in one run, by the number of latents."""
    backbone, reward = GaussianBackbone(), LinearReward()
    value = ExactValue(backbone, reward)
    method(name, **settings).run(problem(backbone, reward, value, steps=steps))
    return value.seen


@pytest.mark.parametrize(
    ("name", "settings", "window"),
    [("fk-steering", {}, "window"), ("fk-steering", {"resample_at": (2,), "proposals": 2}, "proposal_window"),
     ("dps", {}, "window"), ("svdd", {}, "window"), ("dsearch", {}, "window")],
)  # fmt: skip
@pytest.mark.parametrize("unit", ["step", "sigma"])
def test_a_default_in_fractions_is_no_default_in_another_unit(name, settings, window, unit):
    """It would be read as the first step, or as the last levels, and nothing would be steered."""
    if unit == "sigma" and settings:
        settings = settings | {"resample_at": (0.5,)}
    with pytest.raises(ConfigError, match=f"unit is '{unit}', but {window}'s default is in fractions .* give {window}"):
        run(name, unit=unit, **settings)


def test_a_window_that_is_not_used_need_not_be_given():
    assert run("fk-steering", unit="step", resample_at=(3, 5)) == [4, 4]
    assert run("fk-steering", unit="step", window=(3, 11)) == [4, 4, 4]


def test_levels_reach_early_steps():
    """12 steps from 1 to 0: those at 1, 11/12, 10/12 and 9/12; the lower end is left out."""
    assert run("svdd", unit="sigma", window=(8 / 12, 1.0), proposals=3) == [12] * 4


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fk-steering", {"window": (0.51, 0.52)}), ("dps", {"window": (0.51, 0.52)}), ("dsearch", {"window": (0.1, 0.15)}),
     ("svdd", {"unit": "sigma", "window": (0.51, 0.52)}),
     ("fk-steering", {"proposals": 2, "proposal_window": (0.01, 0.05)})],
)  # fmt: skip
def test_a_window_between_two_steps_is_refused(name, settings):
    with pytest.raises(ConfigError, match="holds none of the 12 steps; widen it, or take more"):
        run(name, **settings)
