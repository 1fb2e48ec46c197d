"""The ``stitchvm`` command. Each sub-command is a module here with a ``command`` function, imported when it is called.

A module that works with networks imports them inside its function, so that ``stitchvm list`` and every ``--help``
stay quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..devices import VARIABLE
from ..errors import StitchError

COMMANDS: dict[str, str] = {
    "list": "listing",
    "pairs": "pairing",
    "plan": "plan",
    "search": "search",
    "stitch": "stitch",
    "evaluate": "evaluate",
    "diagnose": "diagnose",
    "align": "align",
    "settings": "settings",
    "quickstart": "quickstart",
    "matrix": "matrix",
    "reproduce": "reproduce",
    "doctor": "doctor",
    "check": "check",
    "new-plugin": "new_plugin",
}
"""Sub-command to module, in the order ``--help`` shows them."""


class LazyGroup(TyperGroup):
    """Imports a sub-command's module only when that one is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name]}", __name__)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(module.command)
        return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"stitchvm {version('stitchvm')}")
        raise typer.Exit


@app.callback()
def _options(
    plugin: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A single-file plugin (.py) or registry file (.toml); may be repeated."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where networks run: cpu, cuda:1 .. (default: a GPU where CUDA runs)."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Value models for diffusion backbones, stitched from their own features and a reward model's tail."""
    if device is not None:
        os.environ[VARIABLE] = device
    if plugin:
        from ..registries import registry

        for path in plugin:
            registry().add(path)


def main() -> None:
    """Run the command line: a mistake of the user's is one line on standard error and exit code 2."""
    try:
        app()
    except StitchError as error:
        message = str(error)
    except OSError as error:  # an output that cannot be written, mostly; the file is what matters
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)
