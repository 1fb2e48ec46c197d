"""From plain data (TOML, JSON) to attrs classes, strictly: no unknown key, no silent conversion, one readable error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from .errors import ConfigError

T = TypeVar("T")


def structure(cls: type[T], data: Any, where: str) -> T:
    """An instance of the attrs class ``cls`` from nested plain data.

    Raises :class:`ConfigError`, one line a fault, each naming ``where``, the key and what was expected there.
    """
    try:
        return _CONVERTER.structure(data, cls)
    except Exception as error:  # cattrs wraps whatever a class's own validators raise
        lines = cattrs.transform_error(error, where, _explain)
        places = (line.rpartition(" @ ") for line in lines)
        raise ConfigError("\n".join(f"{place}: {message.rstrip('.')}." for message, _, place in places)) from error


def plain(instance: Any) -> dict[str, Any]:
    """The instance as nested plain data that :func:`structure` reads back."""
    return dict(_CONVERTER.unstructure(instance))


def with_config_errors(cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    """A ``field_transformer``: attrs' own validators raise :class:`ConfigError` where they would a plain error."""
    return [field.evolve(validator=_as_config_error(field.validator)) if field.validator else field for field in fields]


def _as_config_error(check: Callable[..., None]) -> Callable[..., None]:
    def checked(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        try:
            check(instance, attribute, value)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error.args[0])) from error

    return checked


def _exactly(value: Any, cls: type) -> Any:
    """cattrs would turn 3 into "3" and "no" into True; a settings file means what it says."""
    if cls is float and type(value) is int:
        return float(value)
    if type(value) is not cls:
        raise TypeError(f"expected {_WORDS[cls]}, got {value!r}")
    return value


def _table(value: Any, _: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"expected a table, got {value!r}")
    return dict(value)


def _strings(value: Any, _: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"expected a list of strings, got {value!r}")
    return tuple(value)


def _explain(error: BaseException, expected: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = sorted(field.name for field in attrs.fields(error.cl) if field.name != "source")
        close = [difflib.get_close_matches(key, known, 1) for key in sorted(error.extra_fields)]
        hints = "".join(f", did you mean {match[0]!r}?" for match in close if match)
        names = ", ".join(repr(key) for key in sorted(error.extra_fields))
        return f"unknown key {names}{hints} (expected: {', '.join(known)})"
    if isinstance(error, KeyError):
        return "the key is missing"
    if isinstance(error, TypeError | ValueError) and error.args:
        return str(error.args[0])
    return f"expected {getattr(expected, '__name__', expected)} ({error})"


def _class_hook(cls: type) -> Any:
    """Where a record came from (``source``) is the registry's to say, not a file's."""
    omitted: dict[str, Any] = {f.name: override(omit=True) for f in attrs.fields(cls) if f.name == "source"}
    read: Any = make_dict_structure_fn(cls, _CONVERTER, _cattrs_forbid_extra_keys=True, **omitted)
    return lambda value, wanted: read(_table(value, wanted), wanted)


def _list_hook(cls: Any) -> Any:
    """cattrs would take a text for the list of its letters."""
    read: Any = _CONVERTER.get_structure_hook(list[get_args(cls)[0]])  # type: ignore[misc]
    size = None if get_args(cls)[-1] is ... else len(get_args(cls))

    def checked(value: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or size not in (None, len(value)):
            raise TypeError(f"expected a list{'' if size is None else f' of {size}'}, got {value!r}")
        return tuple(read(list(value), list[get_args(cls)[0]]))  # type: ignore[misc]

    return checked


def _is_alike(cls: Any) -> bool:
    """Whether it is a tuple whose entries are all of one type, but for texts, which have a hook of their own."""
    kinds = set(get_args(cls)) - {...}
    return get_origin(cls) is tuple and len(kinds) == 1 and kinds != {str}


_WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
_CONVERTER = cattrs.Converter(forbid_extra_keys=True)
for _type in _WORDS:
    _CONVERTER.register_structure_hook(_type, _exactly)
_CONVERTER.register_structure_hook_func(lambda t: t == dict[str, Any], _table)
_CONVERTER.register_structure_hook_func(lambda t: t == tuple[str, ...], _strings)
_CONVERTER.register_structure_hook_factory(_is_alike, _list_hook)
_CONVERTER.register_structure_hook_factory(attrs.has, _class_hook)
