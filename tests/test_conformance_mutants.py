"""The kit itself: every check has a broken plugin, catches it, and is the only one that does."""

from __future__ import annotations

import pytest

import toys
from mutant_records import RECORD_MUTANTS, registered
from mutants import MUTANTS
from stitchvm.core.records import CHECKED_KINDS
from stitchvm.core.testing import Report, checks_for, examine

OBJECTS = [(kind, name) for kind in CHECKED_KINDS for name in MUTANTS[kind]]
RECORDS = [(kind, name) for kind in CHECKED_KINDS for name in RECORD_MUTANTS[kind]]


def summary(report: Report) -> list[str]:
    return [failure.message for failure in report.failures]


@pytest.mark.parametrize("kind", CHECKED_KINDS)
def test_every_check_has_a_mutant(kind):
    names = [check.name for check in checks_for(kind)]
    assert len(names) == len(set(names))
    assert set(names) == {*MUTANTS[kind], *RECORD_MUTANTS[kind]}
    assert all(check.claim.endswith(".") for check in checks_for(kind))


@pytest.mark.parametrize(
    "plugin",
    [toys.Backbone, toys.Reward, toys.Scored, toys.Likeness, toys.Aligner, toys.Trainer],
    ids=lambda cls: cls.__name__,
)
def test_a_good_plugin_passes(plugin):
    report = examine(plugin() if plugin in (toys.Aligner, toys.Trainer) else toys.make(plugin))
    assert summary(report) == []
    assert all("record" in r.message or "compares" in r.message for r in report.results if r.status != "passed")


@pytest.mark.parametrize(("kind", "name"), OBJECTS, ids=lambda each: each)
def test_a_broken_plugin_fails_that_check_and_no_other(kind, name):
    report = examine(MUTANTS[kind][name]())
    assert [failure.check for failure in report.failures] == [name], summary(report)
    (message,) = summary(report)
    assert message.startswith(f"{kind} {report.name!r} fails {name!r} (")


@pytest.mark.parametrize("kind", CHECKED_KINDS)
def test_a_good_record_passes(kind, tmp_path, fresh_registry):
    report = examine(registered(None, kind, tmp_path))
    assert summary(report) == []
    assert {r.check for r in report.results if r.status != "passed"} <= {"no-text"}


@pytest.mark.parametrize(("kind", "name"), RECORDS, ids=lambda each: each)
def test_a_broken_record_fails_that_check_and_no_other(kind, name, tmp_path, fresh_registry):
    report = examine(registered(name, kind, tmp_path))
    assert [failure.check for failure in report.failures] == [name], summary(report)
    assert bool(report.not_run) == (name == "builds")
