"""The kit under pytest: a parametrised test, or one class to subclass. Only here is pytest imported, when used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs

from ..errors import ConfigError
from ..records import CheckedKind
from .checks import Check, Subject
from .kit import ConformanceError, checks_for, run_check
from .subjects import subject_of


@attrs.frozen(eq=False)
class BoundCheck:
    """A check with its subject. Calling it fails, passes, or skips with the reason why it is not applicable."""

    check: Check
    subject: Subject

    def __call__(self) -> None:
        result = run_check(self.check, self.subject)
        if result.status == "failed":
            raise ConformanceError(result.message)
        if result.status == "not applicable":
            import pytest

            pytest.skip(f"not applicable: {result.message}")


def parametrize_checks(*given: Any, kind: CheckedKind | None = None, lacks: Mapping[str, str] | None = None) -> Any:
    """A decorator that runs a test once for every check of every plugin given (see ``subject_of``)::

    @parametrize_checks("my-backbone", "my-reward")
    def test_conforms(check):
        check()
    """
    import pytest

    subjects = [subject_of(each, kind=kind, lacks=lacks) for each in given]
    bound = [BoundCheck(check, subject) for subject in subjects for check in checks_for(subject.kind)]
    return pytest.mark.parametrize("check", bound, ids=[f"{each.subject.name}-{each.check.name}" for each in bound])


class Conformance:
    """One test a check; ``given`` and ``lacks`` are what :func:`~stitchvm.core.testing.subject_of` takes."""

    kind: ClassVar[CheckedKind]
    given: ClassVar[Any]
    lacks: ClassVar[Mapping[str, str] | None] = None

    @classmethod
    def subject(cls) -> Subject:
        """Made once a class. Raises :class:`ConfigError` where ``given`` is of another kind than the class."""
        if "_subject" not in cls.__dict__:
            found = subject_of(cls.given, kind=cls.kind, lacks=cls.lacks)
            if found.kind != cls.kind:
                raise ConfigError(
                    f"{found.name!r} is of the kind {found.kind}; derive from {found.kind.capitalize()}Conformance."
                )
            cls._subject = found  # type: ignore[attr-defined]
        subject: Subject = cls.__dict__["_subject"]
        return subject


def _with_tests(cls: type[Conformance]) -> type[Conformance]:
    """A method ``test_<check>`` for every check of the class's kind."""
    for check in checks_for(cls.kind):

        def test(self: Conformance, check: Check = check) -> None:
            BoundCheck(check, type(self).subject())()

        test.__doc__ = check.claim
        setattr(cls, f"test_{check.name.replace('-', '_')}", test)
    return cls


@_with_tests
class BackboneConformance(Conformance):
    """``class TestMine(BackboneConformance): given = "my-backbone"``."""

    kind = "backbone"


@_with_tests
class RewardConformance(Conformance):
    """``class TestMine(RewardConformance): given = "my-reward"``."""

    kind = "reward"


@_with_tests
class AlignerConformance(Conformance):
    """``class TestMine(AlignerConformance): given = "my-method"``."""

    kind = "aligner"


@_with_tests
class TrainerConformance(Conformance):
    """``class TestMine(TrainerConformance): given = "my-method"``, of a method that trains."""

    kind = "trainer"
