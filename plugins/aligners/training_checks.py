"""What steps a method that trains is set to, checked for a ready object as for a settings file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from stitchvm.core import ConfigError


def two_steps(meaning: str, example: tuple[int, int]) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    """An attrs validator of two whole numbers of sampling steps, which raises :class:`ConfigError`; whether a problem
    has such steps is said where it is known."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, tuple | list) or len(value) != 2 or any(type(step) is not int for step in value):
            raise ConfigError(f"{attribute.name} is {value!r}; give two whole numbers, {meaning}, such as {example}.")

    return check


stop_window: Any = attrs.validators.optional(two_steps("the first and the last step to stop after", (3, 7)))
"""A :data:`~stitchvm.core.StopWindow`, or None."""
