"""``stitchvm settings``: what is shown is what a method takes, and its defaults are those it has."""

from __future__ import annotations

import json

import attrs
import pytest

from stitchvm.core import load_aligner, registry
from stitchvm.core.structuring import structure
from stitchvm.core.training.settings import TrainSettings

METHODS = sorted(registry().aligners)
PLUGIN = '''
import attrs
from stitchvm.core import AlignerRecord, hookimpl


@attrs.frozen
class Mine:
    """Settings of mine.

    ``depth``: how deep.

    Raises :class:`ValueError` for none.
    """

    depth: int
    rate: float = 0.5


@hookimpl
def stitchvm_aligners():
    return [AlignerRecord(name="mine", load=f"{__name__}:Mine", spec_version=1)]
'''


def told(run, method: str) -> list[dict]:
    code, out, err = run("settings", method, "--json")
    assert code == 0, err
    return list(json.loads(out))


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_given_back_are_the_method_at_its_defaults(run, method):
    """So ``--set KEY=DEFAULT`` of every one changes nothing, and none is left out."""
    cls, shown = load_aligner(method), told(run, method)
    own = {entry["setting"]: entry["default"] for entry in shown if entry["option"] != "--train"}
    assert structure(cls, own, "shown") == cls() and not any(entry["required"] for entry in shown)
    assert list(own) == [field.name for field in attrs.fields(cls) if field.init]
    training = {entry["setting"]: entry["default"] for entry in shown if entry["option"] == "--train"}
    assert bool(training) == registry().aligner(method).trains
    if training:
        assert structure(TrainSettings, training, "shown") == TrainSettings(**getattr(cls, "training_defaults", {}))


def test_a_setting_is_shown_as_it_is_given(run):
    by_name = {entry["setting"]: entry for entry in told(run, "fk-steering")}
    assert by_name["proposals"]["option"] == "--proposals", "align has an option of that name"
    assert by_name["strength"] == {"option": "--set", "setting": "strength", "takes": "float", "default": 10.0,
                                   "required": False}  # fmt: skip
    assert by_name["potential"]["takes"] == "diff | max | add | rt"
    assert by_name["window"]["takes"] == "[float, float] | null" and by_name["window"]["default"] == [0.2, 0.8]
    assert by_name["resample_at"]["takes"] == "[float, ..] | null"
    assert {entry["setting"]: entry["default"] for entry in told(run, "draft")}["learning_rate"] == 5e-5, "as published"


def test_people_read_what_each_does(run):
    code, out, err = run("settings", "fk-steering")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["option", "setting", "default", "takes"]
    assert next(line.split()[:4] for line in lines if " window " in line) == ["--set", "window", "[0.2,", "0.8]"]
    assert "'strength': lambda" in out and "'kernel': 'ode', 'ancestral'" in out, "inherited ones too"
    assert "Raises" not in out and "``" not in out
    code, out, _ = run("settings", "sample")
    assert code == 0 and out.strip() == "sample has no settings of its own."


def test_a_third_partys_method_with_a_setting_that_has_to_be_given(run, install, fresh_registry):
    install("mine", {"mine": PLUGIN}, {"mine": "mine"})
    depth, rate = told(run, "mine")
    assert depth["required"] and depth["default"] is None
    assert not rate["required"] and rate["default"] == 0.5
    code, out, _ = run("settings", "mine")
    assert code == 0 and "(required)" in out and "'depth': how deep." in out


def test_an_unknown_method_is_named(run):
    code, _, err = run("settings", "fk-stering")
    assert code == 2 and "fk-stering" in err and "fk-steering" in err and err.count("\n") == 1
