"""What ready objects of the training methods refuse: one error that names the setting and says what to give."""

from __future__ import annotations

import math
import re

import pytest

from stitchvm.core import ConfigError
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo

METHODS = (Draft, DiffusionNft, DiffusionDpo, FlowGrpo)
NUMBERS = {
    Draft: ("regularisation", "margin"),
    DiffusionNft: ("mix_beta", "kl_weight", "advantage_clip", "old_decay", "old_decay_rate"),
    DiffusionDpo: ("beta",),
    FlowGrpo: ("noise_level", "clip_range", "advantage_clip", "kl_weight", "ratio_bound"),
}
COUNTS = {
    Draft: ("samples_per_prompt", "backward_steps", "renoised"),
    DiffusionNft: ("samples_per_prompt", "levels", "old_decay_start"),
    DiffusionDpo: ("samples_per_prompt", "levels"),
    FlowGrpo: ("samples_per_prompt", "window_size"),
}


def refused(method: type, name: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {re.escape(repr(value))}; {said}"):
        method(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "much", True])
@pytest.mark.parametrize(("method", "name"), [(m, name) for m, names in NUMBERS.items() for name in names])
def test_a_number_is_finite(method, name, value):
    refused(method, name, value, "give a finite number")


@pytest.mark.parametrize("value", [1.5, 2.0, -1, "3", True])
@pytest.mark.parametrize(("method", "name"), [(m, name) for m, names in COUNTS.items() for name in names])
def test_a_count_is_a_whole_number(method, name, value):
    refused(method, name, value, "give a whole number from")


@pytest.mark.parametrize("value", [3, (3,), (1.5, 2), (1, 2, 3), "12", (True, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_stop_is_two_whole_numbers(method, value):
    refused(method, "stop", value, "give two whole numbers, the first and the last step")


def test_a_window_is_two_whole_numbers():
    refused(FlowGrpo, "window_range", (0,), "give two whole numbers, a window's first step")


@pytest.mark.parametrize(("method", "name", "value", "said"), [
    (Draft, "regularisation", -0.1, "give a finite number from 0 on"),
    (DiffusionNft, "samples_per_prompt", 1, "give a whole number from 2 on"),
    (DiffusionNft, "mix_beta", 0, "give a finite number above 0"),
    (DiffusionNft, "old_decay", 1.5, "give a finite number from 0 to 1"),
    (FlowGrpo, "ratio_bound", 1, "give a finite number above 1"),
])  # fmt: skip
def test_a_number_lies_in_its_range(method, name, value, said):
    refused(method, name, value, said)


def test_cps_puts_back_all_of_the_noise_at_most():
    assert FlowGrpo(noise_level=1.5) and FlowGrpo(sampler="cps", noise_level=1)
    with pytest.raises(ConfigError, match="noise_level is 1.5; give a cps sampler a number above 0, at most 1"):
        FlowGrpo(sampler="cps", noise_level=1.5)


@pytest.mark.parametrize(
    ("method", "name"), [(DiffusionNft, "group_std"), (FlowGrpo, "group_std"), (FlowGrpo, "branch")]
)
def test_a_switch_is_true_or_false(method, name):
    with pytest.raises(ConfigError, match=name):
        method(**{name: "no"})


def test_what_is_allowed_at_the_edges_is():
    assert Draft(stop=(1, 1), backward_steps=None, margin=-2, regularisation=0)
    assert DiffusionNft(levels=1, old_decay=1, kl_weight=0, stop=(2, 5))
    assert FlowGrpo(window_size=1, window_range=(0, 1), kl_weight=0)
