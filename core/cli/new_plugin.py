"""``stitchvm new-plugin``: a package to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..records import PLUGIN_KINDS
from ..scaffold import new_plugin


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")],
    kind: Annotated[str, typer.Option(metavar="KIND", help=f"One of {', '.join(PLUGIN_KINDS)}.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder (default: stitchvm-NAME, here).")
    ] = None,
) -> None:
    """Write a plugin package that installs and passes 'stitchvm check' as it is; then put your own model in."""
    folder = new_plugin(name, kind, out)
    typer.echo(f"Written to {folder}. Next: pip install -e '{folder}[test]' && stitchvm check {name}")
