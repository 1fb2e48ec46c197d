"""``stitchvm check``: does a plugin keep what its kind promises?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..records import PLUGIN_KINDS
from .output import Json, print_json, print_table

if TYPE_CHECKING:
    from ..testing import Report


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A backbone, reward or aligner of 'stitchvm list'.")],
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Where a name stands for several: backbone, reward, aligner.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance kit on a plugin's small twin, without a download; exit with 1 when a check fails."""
    from ..testing.kit import examine

    chosen = next((each for each in PLUGIN_KINDS if each == kind), None)
    if kind is not None and chosen is None:
        raise ConfigError(f"--kind is {kind!r}; choose one of {', '.join(PLUGIN_KINDS)}.")
    report = examine(name, kind=chosen)
    if as_json:
        print_json(report.json())
    else:
        _print(report)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: Report) -> None:
    rows = [(result.check, result.status, result.message or result.claim) for result in report.results]
    print_table((f"{report.kind} {report.name}", "", ""), rows)
    counts = Counter(result.status for result in report.results)
    typer.echo(", ".join(f"{number} {status}" for status, number in counts.items()) + ".")
    if report.not_run:
        typer.echo(f"Not run, as it cannot be made: {', '.join(report.not_run)}.")
