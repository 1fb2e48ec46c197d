"""A matrix from its cells' files: as JSON, as a table of one row a cell, model and noise level, and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plots
from ..files import read_json, write_json, write_text
from ..provenance import versions
from .worlds import cell_name

MODELS = ("stitched", "vae")
COLUMNS = (
    "backbone", "reward", "metric", "model", "sigma", "value", "clean", "retention", "chance", "count", "i", "j", "seed"
)  # fmt: skip


def assemble(
    world: str,
    pairs: Sequence[tuple[str, str]],
    cells: Path,
    shared: Mapping[str, Any],
    failed: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    """What ``matrix.json`` holds: the cells in the folder ``cells`` that were done with the ``shared`` settings, and
    which of ``pairs`` are missing or have ``failed`` with what message.

    Raises ``ArtefactError`` for a damaged cell.
    """
    done, missing = [], []
    for backbone, reward in pairs:
        path = cells / f"{cell_name(backbone, reward)}.json"
        cell = read_json(path) if path.exists() and (backbone, reward) not in failed else None
        if cell is None or cell["settings"]["shared"] != shared:
            missing.append({"backbone": backbone, "reward": reward})
            continue
        models = cell.pop("settings")["models"]
        done.append({**cell, "models": models})
    return {
        "world": world, "partial": bool(missing), "pairs": len(pairs), "measured": len(done),
        "backbones": list(dict.fromkeys(backbone for backbone, _ in pairs)),
        "rewards": list(dict.fromkeys(reward for _, reward in pairs)),
        "missing": missing,
        "failed": [{"backbone": b, "reward": r, "error": error} for (b, r), error in failed.items()],
        "settings": dict(shared), "cells": done, "versions": versions(),
    }  # fmt: skip


def rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a cell, model and noise level, with the keys of :data:`COLUMNS`."""
    return [
        {
            "backbone": cell["backbone"], "reward": cell["reward"], "metric": cell["metric"], "model": model,
            "sigma": sigma, "value": cell[model][k], "clean": cell["clean"], "retention": cell["retention"][model][k],
            "chance": cell["chance"], "count": cell["count"],
            # the baseline is cut at the latent itself
            "i": cell["interface"]["i"] if model == "stitched" else -1,
            "j": cell["interface"]["j"] if model == "stitched" else 1, "seed": cell["seed"],
        }
        for cell in report["cells"] for model in MODELS for k, sigma in enumerate(cell["sigma"])
    ]  # fmt: skip


def write_matrix(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``matrix.csv``, ``matrix.json`` and, where a cell is done, ``matrix.png``; each whole or not at all.

    An undefined retention or chance is an empty field in the table and null in the JSON.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(report))
    write_text(folder / "matrix.csv", text.getvalue())
    write_json(folder / "matrix.json", report)
    if report["cells"]:
        plots.skill_panels(report, folder / "matrix.png")
