"""``stitchvm pairs``: what can be stitched to what."""

from __future__ import annotations

import json
from typing import Annotated

import attrs
import typer

from ..errors import ConfigError
from ..pairing import Pair, github_matrix, registered_pairs
from ..registries import registry
from .output import Json, print_json, print_table


def command(
    as_json: Json = False,
    github: Annotated[
        bool, typer.Option("--github", help="Print the matrix of a GitHub workflow, on one line: a job a backbone.")
    ] = False,
) -> None:
    """List every backbone with every reward: whether they can be stitched here, and why not where not."""
    if as_json and github:
        raise ConfigError("--json and --github are two formats; choose one.")
    if github:
        typer.echo(json.dumps(github_matrix(registry())))
        return
    found = registered_pairs(registry())
    if as_json:
        print_json([{**attrs.asdict(pair), "stitchable": pair.stitchable} for pair in found])
        return
    print_table(("backbone", "reward", "status"), [(pair.backbone, pair.reward, _status(pair)) for pair in found])
    ready = sum(pair.stitchable for pair in found)
    typer.echo(f"{ready} of {len(found)} pairs can be stitched here.", err=True)


def _status(pair: Pair) -> str:
    return " ".join(pair.obstacles) or "ready"
