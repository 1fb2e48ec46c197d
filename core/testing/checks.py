"""What a conformance check is, and what it is run on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from ..records import (
    CAPABILITIES,
    AlignerRecord,
    BackboneRecord,
    CheckedKind,
    ConditionKind,
    Family,
    RewardRecord,
)
from ..registries import registry


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


CHECKS: list[Check] = []
"""Those of the modules that are imported, which register their own."""


def check(
    *kinds: CheckedKind, needs: str = "", only: Sequence[ConditionKind] = (), of_record: bool = False, table: str = ""
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as a check of each of ``kinds``; its name with hyphens is the check's."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        name = function.__name__.replace("_", "-")
        for kind in kinds:
            assert not needs or needs in CAPABILITIES[kind], needs
            CHECKS.append(Check(name, kind, function, needs, tuple(only), of_record, table))
        return function

    return register
