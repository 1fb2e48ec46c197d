"""A table from its cells' files: as JSON, as one line a row in CSV, and as pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from ..comparison import mean_stderr, paired_gain
from ..costs import KINDS
from ..files import write_json, write_text
from ..provenance import versions
from . import plots
from .alignment_rows import PLAIN, Row, Table
from .cells import read_cell
from .worlds import World


@attrs.frozen
class Expected:
    """A row of one pair, and the file that its cell is in once it is done."""

    backbone: str
    reward: str
    row: Row
    path: Path

    @property
    def pair(self) -> tuple[str, str]:
        """Backbone and reward."""
        return self.backbone, self.reward


def assemble(
    name: str,
    table: Table,
    world: World,
    expected: Sequence[Expected],
    shared: Mapping[str, Any],
    failed: Mapping[Path, str],
    unfit: Mapping[str, str],
) -> dict[str, Any]:
    """What ``TABLE.json`` holds: the rows whose cells are there, those that are missing, that have ``failed`` or do not
    apply, and the rewards that no row is judged by. ``mixed``: the pairs of which rows were steered by one value model
    and rows by another of the same source, as after an ask for some rows by another one.
    """
    cells = {e.path: None if e.path in failed else read_cell(e.path) for e in expected}
    plain = {e.pair: cells[e.path] for e in expected if e.row.name == PLAIN}
    rows, missing, inapplicable = [], [], []
    steered_by: dict[tuple[str, str, str | None], set[str]] = {}
    for each in expected:
        label = {"backbone": each.backbone, "reward": each.reward, "row": each.row.name}
        cell = cells[each.path]
        if cell is None:
            missing.append(label)
        elif "not_applicable" in cell:
            inapplicable.append({**label, "reason": cell["not_applicable"]})
        else:
            rows.append(entry(each, cell, plain[each.pair]))
            if (value := cell["models"]["value"]) is not None:
                steered_by.setdefault((*each.pair, each.row.source), set()).add(value)
    if table.best:
        mark_best(rows)
    return {
        "table": name, "title": table.title, "world": world.name, "partial": bool(missing), "rows": rows,
        "expected": len(expected) - len(inapplicable), "measured": len(rows), "missing": missing,
        "failed": [{"backbone": e.backbone, "reward": e.reward, "row": e.row.name, "error": failed[e.path]}
                   for e in expected if e.path in failed],
        "mixed": [{"backbone": backbone, "reward": reward, "source": source or backbone}
                  for (backbone, reward, source), values in steered_by.items() if len(values) > 1],
        "not_applicable": inapplicable, "rewards": [r for r in world.rewards if r not in unfit],
        "unfit_rewards": dict(unfit), "settings": dict(shared), "versions": versions(),
    }  # fmt: skip


def entry(each: Expected, cell: Mapping[str, Any], plain: Mapping[str, Any] | None) -> dict[str, Any]:
    """One row, JSON-able: ``scores`` by reward and ``detector`` as ``{mean, stderr}`` over the prompts, and their
    ``gains`` paired with the ``plain`` sampler's cell; null for the plain sampler itself and where that is missing."""
    row, base = each.row, None if each.row.name == PLAIN else plain
    scores = cell["scores"]
    detector = cell["detector"]
    gains = {name: None if base is None else paired_gain(scores[name], base["scores"][name]).report()
             for name in scores}  # fmt: skip
    shown = base is not None and detector is not None and base["detector"] is not None
    return {
        "backbone": each.backbone, "reward": each.reward, "row": row.name, "label": row.label, "method": row.method,
        "value": row.value, "source": (row.source or each.backbone) if row.value == "stitched" else None,
        "curve": row.curve, "at": row.at, "best": False, "settings": cell["row"]["settings"],
        "prompts": len(cell["prompts"]), "gains": gains,
        "scores": {name: mean_stderr(values).report() for name, values in scores.items()},
        "detector": None if detector is None else mean_stderr(detector).report(),
        "detector_gain": paired_gain(detector, base["detector"]).report() if shown and base is not None else None,
        "cost": cell["cost"], "equivalents": cell["equivalents"], "run": cell["run"],
    }  # fmt: skip


def mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """Mark the row of the highest target reward of every pair's curves, among those that keep what the detector sees;
    among all where none does."""
    curves: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["curve"] is not None:
            curves.setdefault((row["backbone"], row["reward"], row["curve"]), []).append(row)
    for found in curves.values():
        max([row for row in found if _keeps(row)] or found, key=_target)["best"] = True


def _keeps(row: Mapping[str, Any]) -> bool:
    """Whether the detector's paired loss against the plain sampler is within two standard errors, or not measured."""
    gain = row["detector_gain"]
    return gain is None or gain["mean"] + 2 * gain["stderr"] >= 0


def _target(row: Mapping[str, Any]) -> float:
    return float(row["scores"][row["reward"]]["mean"])


_ABOUT = ("backbone", "reward", "row", "method", "value", "source", "curve", "at", "best", "prompts")


def columns(report: Mapping[str, Any]) -> list[str]:
    """The table's header: what a row is, target and detector with gains, every reward by name, and the cost."""
    figures = [f"{what}{part}" for what in ("target", "detector", *report["rewards"])
               for part in ("", "_stderr", "_gain", "_gain_stderr")]  # fmt: skip
    return [*_ABOUT, *figures, *(f"{kind}_passes" for kind in KINDS), "equivalents", "seconds", "peak_memory", "seed"]


def lines(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a row, with the keys of :func:`columns`; what is not there is an empty field."""
    found = []
    for row in report["rows"]:
        line: dict[str, Any] = {name: row[name] for name in _ABOUT}
        figures = {"target": (row["scores"][row["reward"]], row["gains"][row["reward"]]),
                   "detector": (row["detector"], row["detector_gain"]),
                   **{name: (row["scores"][name], row["gains"][name]) for name in report["rewards"]}}  # fmt: skip
        for name, (mean, gain) in figures.items():
            for suffix, number in (("", mean), ("_gain", gain)):
                line[name + suffix] = None if number is None else number["mean"]
                line[f"{name}{suffix}_stderr"] = None if number is None else number["stderr"]
        cost = row["cost"]
        line |= {f"{kind}_passes": int(cost.get(kind, 0)) for kind in KINDS}
        line |= {"equivalents": row["equivalents"], "seconds": cost["seconds"], "peak_memory": cost["peak_memory"],
                 "seed": report["settings"]["seed"]}  # fmt: skip
        found.append(line)
    return found


def write_report(report: Mapping[str, Any], folder: Path, *, pictures: bool = True) -> None:
    """Write ``TABLE.csv`` and ``TABLE.json`` and, with ``pictures`` and where a row is done, ``TABLE.png``; each whole
    or not at all. A sweep's curves are in ``TABLE-sweep.png``."""
    name = report["table"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(report), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines(report))
    write_text(folder / f"{name}.csv", text.getvalue())
    write_json(folder / f"{name}.json", report)
    if not pictures or not report["rows"]:
        return
    if name == "fig3":
        plots.cost_curves(report, folder / f"{name}.png")
    else:
        plots.reward_bars(report, folder / f"{name}.png")
    if any(row["best"] for row in report["rows"]):
        plots.sweep_curves(report, folder / f"{name}-sweep.png")
