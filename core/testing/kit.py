"""Running conformance checks, and what becomes of them. Nothing here needs pytest.

A check is one function with one claim, its docstring. What a plugin says it ``lacks`` is run all the same: where the
check fails, as it must, it is *not applicable*; where it passes, the declaration is wrong and the check has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import attrs
import torch

from ..errors import StitchError
from ..records import CheckedKind, ConditionKind
from . import aligners, backbones, records, rewards, sliced, trainers  # noqa: F401  (they register their checks)
from .checks import CHECKS, Check, Subject
from .expect import Mismatch
from .subjects import subject_of

FIRST = "builds"
"""The check without which the others have nothing to run on."""
Status = Literal["passed", "failed", "not applicable"]


class ConformanceError(StitchError, AssertionError):
    """A plugin that does not keep what its kind promises."""


@attrs.frozen
class Result:
    """What became of a check; ``message`` says why it failed or does not apply."""

    check: str
    claim: str
    status: Status
    message: str = ""


@attrs.frozen
class Report:
    """All results of one plugin; ``not_run`` names the checks that had nothing to run on."""

    name: str
    kind: CheckedKind
    results: tuple[Result, ...]
    not_run: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == "failed")

    def json(self) -> dict[str, Any]:
        """JSON-able."""
        return {**attrs.asdict(self), "passed": self.passed}


def checks_for(kind: CheckedKind) -> tuple[Check, ...]:
    """Every check of a kind of plugin: whether it builds, those of its record, the others."""
    return tuple(sorted((c for c in CHECKS if c.kind == kind), key=lambda c: (c.name != FIRST, not c.of_record)))


def run_check(check: Check, subject: Subject) -> Result:
    """One check on one subject. Whatever the plugin raises is a failure of the check."""
    reason = _about_another(check, subject)
    if reason:
        return Result(check.name, check.claim, "not applicable", reason)
    problem = _problem(check, subject)
    lacking = subject.lacks.get(check.needs, "") if check.needs else ""
    if lacking and problem:
        return Result(check.name, check.claim, "not applicable", f"declared: {check.needs}: {lacking}")
    if lacking:
        problem = f"it says that it lacks {check.needs!r} ({lacking}), but the check passes: remove that from 'lacks'."
    if not problem:
        return Result(check.name, check.claim, "passed")
    head = f"{subject.kind} {subject.name!r} fails {check.name!r} ({check.claim})"
    way_out = f" If it cannot, declare it: lacks={{{check.needs!r}: why}}." if check.needs and not lacking else ""
    return Result(check.name, check.claim, "failed", f"{head}: {problem}{way_out}")


def _about_another(check: Check, subject: Subject) -> str:
    """Why a check has nothing to say about the subject, or nothing."""
    if check.of_record and subject.record is None:
        return "given as an object, which has no registry record"
    path = getattr(subject.record, "path", None)
    if check.table and path and not getattr(subject.record, check.table):
        return f"the record has no table {check.table!r}; its weights at {path} are checked instead"
    kind = _condition_kind(subject) if check.only else None
    if kind is None or kind in check.only:
        return ""
    return f"it compares with {kind}, this is about rewards that compare with {' or '.join(check.only)}"


def _condition_kind(subject: Subject) -> ConditionKind | None:
    """None for a reward that cannot be made or does not say; its checks then fail for that reason."""
    try:
        return cast(ConditionKind, subject.plugin.condition_kind)
    except Exception:
        return None


def _problem(check: Check, subject: Subject) -> str:
    """What is wrong, or nothing."""
    try:
        with torch.no_grad():
            check.function(subject if check.of_record else subject.plugin)
    except Mismatch as found:
        return str(found)
    except (Exception, SystemExit) as error:  # whatever a stranger's plugin raises
        message = " ".join(str(error).split())
        return f"it raised {type(error).__name__}: {message}" + ("" if message.endswith(".") else ".")
    return ""


def examine(given: Any, *, kind: CheckedKind | None = None, lacks: Mapping[str, str] | None = None) -> Report:
    """Run every check on ``given`` (see :func:`subject_of`). Where it cannot even be made, that is the one result."""
    subject = subject_of(given, kind=kind, lacks=lacks)
    checks = checks_for(subject.kind)
    results: list[Result] = []
    for number, each in enumerate(checks):
        results.append(run_check(each, subject))
        if each.name == FIRST and results[-1].status == "failed":
            return Report(subject.name, subject.kind, tuple(results), tuple(c.name for c in checks[number + 1 :]))
    return Report(subject.name, subject.kind, tuple(results))
