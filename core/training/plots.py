"""Pictures of a training."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, decorate, open_figure

_NOTHING: Mapping[str, None] = {"mean": None, "stderr": None}
"""Of a part in an evaluation that knew no parts."""


def training_curves(evaluations: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a reward, the trained one first, then its parts where it is a sum: mean and standard error by seconds of
    training; nothing where an evaluation has no finite score of it."""
    trained, *held_out = evaluations[0]["rewards"]
    parts = evaluations[-1].get("parts", {})
    panels = [("rewards", trained, "trained", BLUE),
              *(("parts", name, "part of the trained sum", PURPLE) for name in parts),
              *(("rewards", name, "held out", GREEN) for name in held_out)]  # fmt: skip
    seconds = [entry["seconds"] for entry in evaluations]
    with open_figure(path, 4 * len(panels), 3.2) as figure:
        for number, (kind, name, role, colour) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            found = [entry.get(kind, {}).get(name, _NOTHING) for entry in evaluations]
            means = [math.nan if each["mean"] is None else each["mean"] for each in found]
            errors = [each["stderr"] or 0.0 for each in found]
            axes.errorbar(seconds, means, errors, color=colour, marker="o", markersize=3, capsize=2)
            fell = [n for n, entry in enumerate(evaluations) if name in entry["fallen"]]
            axes.plot([seconds[n] for n in fell], [means[n] for n in fell], "v", color=ORANGE)
            decorate(axes, f"{name} ({role})", "seconds of training", "mean")


def _line_styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and line of every row: a stopped training is dashed, in the colour of the plain one that it is ``beside``,
    or in its own where several stand beside that one (as the windows of figure 7)."""
    besides = {row["row"]: row["beside"] for row in rows}
    stopped = Counter(besides.values())
    shared = {name: beside for name, beside in besides.items() if beside in besides and stopped[beside] == 1}
    own = [name for name in besides if name not in shared]
    colours = dict(zip(own, itertools.cycle([BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY]), strict=False))
    return {name: (colours[shared.get(name, name)], "--" if beside else "-") for name, beside in besides.items()}


def comparison_curves(report: Mapping[str, Any], against: str, path: Path) -> None:
    """A row a backbone, a panel a reward: every training's mean by ``seconds`` or denoiser ``passes``, seeds thin."""
    backbones = list(dict.fromkeys(row["backbone"] for row in report["rows"]))
    rewards = list(report["rows"][0]["after"])
    lines = _line_styles(report["rows"])
    with open_figure(path, 4 * len(rewards), 3.2 * len(backbones)) as figure:
        for place, backbone in enumerate(backbones):
            for column, reward in enumerate(rewards):
                axes = figure.add_subplot(len(backbones), len(rewards), place * len(rewards) + column + 1)
                for row in (row for row in report["rows"] if row["backbone"] == backbone):
                    colour, style = lines[row["row"]]
                    for number, curve in enumerate(row["curves"]):
                        label = None if number else row["label"]
                        means = [math.nan if mean is None else mean for mean in curve[reward]]
                        axes.plot(curve[against], means, style, color=colour, label=label, linewidth=1)
                words = "seconds of training" if against == "seconds" else "denoiser passes"
                decorate(axes, f"{backbone}: {reward}", words, "mean")
                if place == column == 0:
                    axes.legend(fontsize=7)
