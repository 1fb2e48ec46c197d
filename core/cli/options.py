"""Arguments and options that several sub-commands share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..images import ImageSource

BackboneName = Annotated[str, typer.Argument(metavar="BACKBONE", help="A backbone of 'stitchvm list'.")]
RewardNames = Annotated[
    str, typer.Argument(metavar="REWARD", help="A reward of 'stitchvm list', or several separated by commas.")
]
Images = Annotated[
    str, typer.Option(metavar="SRC", help="A dataset of 'stitchvm list', an image folder, or a Hugging Face dataset.")
]
Cuts = Annotated[
    str | None, typer.Option(metavar="LIST", help="Backbone cuts to try, such as 2,4-8 (default: after every block).")
]
Blocks = Annotated[str, typer.Option(metavar="LIST", help="Reward blocks to try entering before, such as 1-4.")]
Weights = Annotated[
    str | None, typer.Option(metavar="LIST", help="Of the rewards of --reward, such as 1,0.5 (default: 1 each).")
]
EmbeddedGuidance = Annotated[
    float | None, typer.Option(help="What a distilled backbone reads beside its time (FLUX; default: its own).")
]
Taps = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Earlier backbone cuts that the layer reads too, such as 1,4 (default: none)."),
]


def names(text: str, argument: str) -> tuple[str, ...]:
    """``"hpsv2,aesthetic"`` as a tuple of names; :class:`ConfigError` names the argument."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise ConfigError(f"{argument} is {text!r}; write one name, or several such as hpsv2,aesthetic.")
    return found


def reals(text: str, option: str) -> tuple[float, ...]:
    """``"1,0.5"`` as numbers; :class:`ConfigError` names the option."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; write numbers, such as 1,0.5.") from error


def weighted(reward: str | None, weights: str | None) -> Sequence[str] | Mapping[str, float] | None:
    """What ``--reward`` and ``--weights`` say together; None for neither, which leaves the reward to the value.

    Raises :class:`ConfigError` for weights without a reward or as many, and for a reward given twice.
    """
    if reward is None:
        if weights is not None:
            raise ConfigError("--weights are of the rewards of --reward; name those.")
        return None
    found = names(reward, "--reward")
    if weights is None:
        return found
    from ..joint import checked_weights

    by_name = dict(zip(found, checked_weights(found, reals(weights, "--weights")), strict=True))
    if len(by_name) < len(found):
        raise ConfigError(f"--reward is {reward!r}, one of them twice; give it once, with a larger weight.")
    return by_name


def numbers(text: str, option: str) -> tuple[int, ...]:
    """``"2,4-6"`` as ``(2, 4, 5, 6)``; :class:`ConfigError` names the option."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; write whole numbers, such as 2,4-8.") from error
    if not found:
        raise ConfigError(f"{option} is {text!r}, which holds no number; write for example 2,4-8.")
    return tuple(dict.fromkeys(found))


def warn_skipped(source: ImageSource) -> None:
    """Say on standard error which images could not be read."""
    for line in source.skipped:
        typer.echo(f"skipped: {line}", err=True)


def levels(text: str, option: str) -> tuple[float, ...]:
    """``"0.1,0.5"`` as noise levels in [0, 1]; :class:`ConfigError` names the option."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; write numbers from 0 to 1, such as 0.1,0.5.") from error
    if not all(0 <= level <= 1 for level in found):
        raise ConfigError(f"{option} is {text!r}; noise levels lie from 0 (clean) to 1.")
    return found


def key_values(pairs: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """``["strength=20", "window=[0.2, 0.8]", "kernel=ode"]`` as a table: JSON where it is some, else a string.

    Raises :class:`ConfigError` for an entry without ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} is {pair!r}; write KEY=VALUE, such as {example}.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def refuse_given(context: typer.Context, parameters: Sequence[str], because: str) -> None:
    """Raise :class:`ConfigError`, naming them, where some of the ``parameters`` stand on the command line."""
    given = []
    for name in parameters:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(parameter for parameter in context.command.params if parameter.name == name)
            given.append(option.opts[0])
    if given:
        raise ConfigError(f"{', '.join(given)} means nothing here: {because}")
