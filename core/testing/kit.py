"""What a conformance check is, whom it is run on, and what becomes of it. Nothing here needs pytest.

A check is one function with one claim, its docstring. What a plugin says it ``lacks`` is run all the same: where the
check fails, as it must, it is *not applicable*; where it passes, the declaration is wrong and the check has failed.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import attrs
import torch

from ..backbone import Backbone
from ..errors import ConfigError, StitchError, UnknownNameError
from ..loading import build_twin, load_aligner, load_backbone, load_reward
from ..records import (
    CAPABILITIES,
    PLUGIN_KINDS,
    AlignerRecord,
    BackboneRecord,
    CheckedKind,
    ConditionKind,
    Family,
    RewardRecord,
)
from ..registries import registry
from ..reward import Reward
from ..slicing import Sliced
from .expect import Mismatch

FIRST = "builds"
"""The check without which the others have nothing to run on."""
Status = Literal["passed", "failed", "not applicable"]


class ConformanceError(StitchError, AssertionError):
    """A plugin that does not keep what its kind promises."""


@attrs.define(eq=False)
class Subject:
    """What is being checked: a plugin object, made when it is first needed, and its registry record if it has one."""

    name: str
    kind: CheckedKind
    make: Callable[[], Any]
    record: BackboneRecord | RewardRecord | AlignerRecord | None = None
    lacks: Mapping[str, str] = attrs.field(factory=dict)
    _made: Any = attrs.field(default=None, init=False)

    @property
    def plugin(self) -> Any:
        """The network, or the method with its default settings."""
        if self._made is None:
            self._made = self.make()
        return self._made

    @property
    def family(self) -> Family:
        """The code behind a model's record."""
        assert isinstance(self.record, BackboneRecord | RewardRecord)
        return registry().family(self.record)


@attrs.frozen
class Check:
    """One named claim about one kind of plugin.

    ``needs`` names the capability without which it cannot hold, ``only`` the kinds of condition it is about. A check
    ``of_record`` is given the :class:`Subject`, any other the plugin alone; ``table`` is the record's table it is
    about, which a record with local weights may leave out: those are checked instead.
    """

    name: str
    kind: CheckedKind
    function: Callable[[Any], None]
    needs: str = ""
    only: tuple[ConditionKind, ...] = ()
    of_record: bool = False
    table: str = ""

    @property
    def claim(self) -> str:
        """What must hold, in a sentence."""
        return " ".join((inspect.getdoc(self.function) or "").split("\n\n")[0].split())


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


_CHECKS: list[Check] = []


def check(
    *kinds: CheckedKind, needs: str = "", only: Sequence[ConditionKind] = (), of_record: bool = False, table: str = ""
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as a check of each of ``kinds``; its name with hyphens is the check's."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        name = function.__name__.replace("_", "-")
        for kind in kinds:
            assert not needs or needs in CAPABILITIES[kind], needs
            _CHECKS.append(Check(name, kind, function, needs, tuple(only), of_record, table))
        return function

    return register


def checks_for(kind: CheckedKind) -> tuple[Check, ...]:
    """Every check of a kind of plugin: whether it builds, those of its record, the others."""
    from . import aligners, backbones, records, rewards, sliced, trainers  # noqa: F401  (they register themselves)

    return tuple(sorted((c for c in _CHECKS if c.kind == kind), key=lambda c: (c.name != FIRST, not c.of_record)))


def subject_of(given: Any, *, kind: CheckedKind | None = None, lacks: Mapping[str, str] | None = None) -> Subject:
    """What to check: a registered name or a record (its twin is built, or without one its local weights are loaded), or
    an object: a backbone, a reward, or a method with its settings.

    ``kind`` decides where a name stands for several things (an aligner and a trainer never share one). ``lacks`` is the
    family's own unless given. Raises ``UnknownNameError`` and :class:`ConfigError`.
    """
    if isinstance(given, str):
        given = _record_named(given, kind)
    if isinstance(given, BackboneRecord | RewardRecord | AlignerRecord):
        declared = given if isinstance(given, AlignerRecord) else registry().family(given)
        own = declared.checked_kind if isinstance(declared, AlignerRecord) else declared.kind
        ours = declared.lacks if lacks is None else lacks
        return Subject(given.name, own, functools.partial(_open, given), given, _known(own, ours))
    if isinstance(given, type) and issubclass(given, Sliced):
        raise ConfigError(f"{given.__name__} is a class; give a network, such as {given.__name__}.build(twin).")
    own = _kind_of(given)
    plugin = given() if isinstance(given, type) else given
    return Subject(type(plugin).__name__, own, lambda: plugin, None, _known(own, lacks or {}))


def _kind_of(plugin: Any) -> CheckedKind:
    """What an object is taken for; :class:`ConfigError` where it is nothing that there are checks for."""
    if isinstance(plugin, Backbone):
        return "backbone"
    if isinstance(plugin, Reward):
        return "reward"
    if callable(getattr(plugin, "collect", None)):
        return "trainer"
    if callable(getattr(plugin, "run", None)):
        return "aligner"
    raise ConfigError(f"a {type(plugin).__name__} is no backbone, reward or aligner; give one, or its name.")


def _known(kind: CheckedKind, lacks: Mapping[str, str]) -> Mapping[str, str]:
    unknown = sorted(set(lacks) - set(CAPABILITIES[kind]))
    if unknown:
        raise ConfigError(f"lacks names {', '.join(unknown)}; choose from {', '.join(CAPABILITIES[kind])}.")
    return lacks


def _record_named(name: str, kind: CheckedKind | None) -> Any:
    """The one record of that name; an :class:`UnknownNameError` that says what was meant or what to install."""
    names = registry()
    shelves: dict[CheckedKind, Mapping[str, Any]] = {
        "backbone": names.backbones, "reward": names.rewards, "aligner": names.aligners, "trainer": names.aligners,
    }  # fmt: skip
    if kind is not None:
        return shelves[kind][name]
    found = [own for own in PLUGIN_KINDS if name in shelves[own]]
    if len(found) > 1:
        raise ConfigError(f"{name!r} is a {' and a '.join(found)}; say which one (kind).")
    if not found:
        hinted = [own for own in PLUGIN_KINDS if (own, name) in names.hints]
        close = difflib.get_close_matches(name.lower(), [n for shelf in shelves.values() for n in shelf], 1)
        found = hinted or [own for own in PLUGIN_KINDS if close and close[0] in shelves[own]]
    if not found:
        raise UnknownNameError(f"unknown backbone, reward or aligner {name!r}; 'stitchvm list' shows what there is.")
    return shelves[found[0]][name]


def _open(record: BackboneRecord | RewardRecord | AlignerRecord) -> Any:
    """The plugin behind a record, without a download."""
    if isinstance(record, AlignerRecord):
        return load_aligner(record)()
    if record.twin:
        return build_twin(record)
    if record.path is None:
        raise ConfigError(f"{record.name!r} has no twin to check; give its record the table 'twin', a small build().")
    return load_backbone(record) if isinstance(record, BackboneRecord) else load_reward(record)


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
