"""``stitchvm settings``: what ``--set`` and ``--train`` of ``align`` take."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
import typer

from .output import Json, print_json, print_table


def command(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="An aligner of 'stitchvm list'.")],
    as_json: Json = False,
) -> None:
    """List the settings of an alignment method, with their defaults and what each does.

    Of one that trains, those of the training too, which 'stitchvm align' takes as --train KEY=VALUE.
    """
    from ..loading import load_aligner
    from ..registries import registry

    cls = load_aligner(method)
    settings, classes = _settings(cls, _option), [cls]
    if registry().aligner(method).trains:
        from ..training.settings import TrainSettings

        settings += _settings(TrainSettings, lambda _: "--train", getattr(cls, "training_defaults", {}))
        classes.append(TrainSettings)
    if as_json:
        print_json(settings)
        return
    if not settings:
        typer.echo(f"{method} has no settings of its own.")
        return
    print_table(
        ("option", "setting", "default", "takes"),
        [(each["option"], each["setting"], _default(each), each["takes"]) for each in settings],
    )
    for text in dict.fromkeys(text for each in classes for text in _explained(each)):
        typer.echo(f"\n{text}")


def _option(setting: str) -> str:
    """How a method's setting is given: some are options of ``align`` itself."""
    from . import align

    return f"--{setting}" if setting in inspect.signature(align.command).parameters else "--set"


def _settings(
    cls: type[Any], option: Callable[[str], str], own: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Of every field of the attrs class ``cls``, JSON-able: how it is given, what it takes, and its default (that of
    ``own`` before the class's), or that it is ``required``."""
    if not attrs.has(cls):
        return []
    hints, fields = get_type_hints(cls), [field for field in attrs.fields(cls) if field.init]
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    # defaults may depend on each other, and only an instance has worked them out
    plain = {field.name: field.default for field in fields if not isinstance(field.default, attrs.Factory)}  # type: ignore[arg-type]
    ready = plain if required else attrs.asdict(cls(**(own or {})))
    return [
        {"option": option(field.name), "setting": field.name, "takes": _takes(hints[field.name]),
         "default": None if field.name in required else ready.get(field.name), "required": field.name in required}
        for field in fields
    ]  # fmt: skip


def _default(setting: Mapping[str, Any]) -> str:
    return "(required)" if setting["required"] else _written(setting["default"])


def _written(value: Any) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _takes(hint: Any) -> str:
    """A type as values of it are written."""
    parts = get_args(hint)
    if hint in (None, NoneType):
        return "null"
    if get_origin(hint) is Literal:
        return " | ".join(map(_written, parts))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_takes, parts))
    if get_origin(hint) is tuple:
        return f"[{', '.join('..' if part is Ellipsis else _takes(part) for part in parts)}]"
    if attrs.has(hint):
        return "{" + ", ".join(field.name for field in attrs.fields(hint)) + "}"
    return str(getattr(hint, "__name__", hint))


def _explained(cls: type[Any]) -> list[str]:
    """What a class, and those that it takes settings from, say of them: all but what they raise."""
    told = [inspect.cleandoc(vars(base)["__doc__"] or "") for base in cls.__mro__ if attrs.has(base)]
    paragraphs = [[part for part in text.split("\n\n") if not part.startswith("Raises")] for text in told]
    return ["\n\n".join(part).replace("``", "'") for part in paragraphs if any(part)]
