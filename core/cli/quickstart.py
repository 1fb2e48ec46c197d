"""``stitchvm quickstart``: the whole job on a small trained pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, print_json, print_table


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes; a rerun continues there.")],
    fast: Annotated[bool, typer.Option("--fast", help="Two minutes instead of ten: a smaller finetune.")] = False,
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
    as_json: Json = False,
) -> None:
    """Search, finetune, evaluate and steer a small pair, and show it all in DIR/report.html."""
    from ..quickstart import quickstart

    summary = quickstart(out, fast=fast, seed=seed, progress=True)
    if as_json:
        print_json(summary)
    else:
        _print(summary, out)


def _print(summary: dict[str, Any], out: Path) -> None:
    from ..comparison import MeanStderr
    from ..plots import METHODS, percent
    from ..report import headline

    recalls, steering = summary["retrieval"], summary["steering"]
    print_table(
        ("sigma", *(f"{sigma:g}" for sigma in recalls["sigma"])),
        [("share of the clean recall kept", *(percent(share) for share in recalls["retention"]))],
    )
    typer.echo()
    rows = []
    for name, label in METHODS.items():
        entries = (steering[name].get(key) for key in ("reward", "gain", "detector"))
        texts = ("" if entry is None else str(MeanStderr(**entry)) for entry in entries)
        rows.append((label, *texts, f"{steering[name]['cost']['seconds']:.0f}"))
    print_table(("method", "reward", "gain", "captions fulfilled", "seconds"), rows)
    typer.echo(f"\n{headline(summary)}\nReport: {out / 'report.html'} ({summary['seconds']['total']:.0f} s)")
