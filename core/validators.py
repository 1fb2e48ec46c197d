"""Checks that settings share, as attrs validators and of single values: each raises :class:`ConfigError` with the name
and what to give."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import attrs

from .errors import ConfigError

Validator = Callable[[object, "attrs.Attribute[Any]", Any], None]


def checked_whole(name: str, value: object, lowest: int) -> int:
    """A whole number called ``name``, ``lowest`` or more."""
    if type(value) is not int or value < lowest:
        raise ConfigError(f"{name} is {value!r}; give a whole number from {lowest} on.")
    return value


def checked_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number called ``name``, from ``low`` to ``high``, both allowed."""
    number = _finite(value)
    if number is None or not low <= number <= high:
        wanted = "" if low == -math.inf else f" from {low:g} " + ("on" if high == math.inf else f"to {high:g}")
        raise ConfigError(f"{name} is {value!r}; give a finite number{wanted}.")
    return number


def whole_from(lowest: int) -> Validator:
    """A whole number, ``lowest`` or more."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        checked_whole(attribute.name, value, lowest)

    return check


def number_within(low: float, high: float = math.inf) -> Validator:
    """A finite number from ``low`` to ``high``, both allowed."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        checked_number(attribute.name, value, low, high)

    return check


def number_above(low: float) -> Validator:
    """A finite number greater than ``low``."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        number = _finite(value)
        if number is None or number <= low:
            raise ConfigError(f"{attribute.name} is {value!r}; give a finite number above {low:g}.")

    return check


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def one_of(choices: Collection[str]) -> Validator:
    """One of the names that ``choices`` lists."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in choices:
            raise ConfigError(f"{attribute.name} is {value!r}; choose one of {', '.join(choices)}.")

    return check
