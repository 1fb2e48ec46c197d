"""``stitchvm pairs``: what can be stitched to what."""

from __future__ import annotations

from ..registries import pairs
from .output import Json, print_json, print_table


def command(as_json: Json = False) -> None:
    """List every backbone and reward that can be stitched."""
    found = pairs()
    if as_json:
        print_json([{"backbone": backbone, "reward": reward} for backbone, reward in found])
    else:
        print_table(("backbone", "reward"), found)
