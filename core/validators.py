"""attrs validators that settings share: each raises :class:`ConfigError` with the field's name and what to give."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import attrs

from .errors import ConfigError

Validator = Callable[[object, "attrs.Attribute[Any]", Any], None]


def whole_from(lowest: int) -> Validator:
    """A whole number, ``lowest`` or more."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if type(value) is not int or value < lowest:
            raise ConfigError(f"{attribute.name} is {value!r}; give a whole number from {lowest} on.")

    return check


def number_within(low: float, high: float = math.inf) -> Validator:
    """A finite number from ``low`` to ``high``, both allowed."""
    wanted = "" if low == -math.inf else f" from {low:g} " + ("on" if high == math.inf else f"to {high:g}")
    return _number(lambda value: low <= value <= high, wanted)


def number_above(low: float) -> Validator:
    """A finite number greater than ``low``."""
    return _number(lambda value: value > low, f" above {low:g}")


def _number(allowed: Callable[[float], bool], wanted: str) -> Validator:
    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else value
        if not (math.isfinite(number) and allowed(number)):
            raise ConfigError(f"{attribute.name} is {value!r}; give a finite number{wanted}.")

    return check


def one_of(choices: Collection[str]) -> Validator:
    """One of the names that ``choices`` lists."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in choices:
            raise ConfigError(f"{attribute.name} is {value!r}; choose one of {', '.join(choices)}.")

    return check
