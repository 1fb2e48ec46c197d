"""Pictures of a training."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, decorate, open_figure


def training_curves(evaluations: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a reward, the trained one first: mean and standard error by seconds of training."""
    names = list(evaluations[0]["rewards"])
    seconds = [entry["seconds"] for entry in evaluations]
    with open_figure(path, 4 * len(names), 3.2) as figure:
        for number, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), number + 1)
            means = [entry["rewards"][name]["mean"] for entry in evaluations]
            errors = [entry["rewards"][name]["stderr"] or 0.0 for entry in evaluations]
            axes.errorbar(seconds, means, errors, color=GREEN if number else BLUE, marker="o", markersize=3, capsize=2)
            fell = [n for n, entry in enumerate(evaluations) if name in entry["fallen"]]
            axes.plot([seconds[n] for n in fell], [means[n] for n in fell], "v", color=ORANGE)
            decorate(axes, f"{name} ({'held out' if number else 'trained'})", "seconds of training", "mean")


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
                        axes.plot(curve[against], curve[reward], style, color=colour, label=label, linewidth=1)
                words = "seconds of training" if against == "seconds" else "denoiser passes"
                decorate(axes, f"{backbone}: {reward}", words, "mean")
                if place == column == 0:
                    axes.legend(fontsize=7)
