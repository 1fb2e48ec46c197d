"""Pictures of a training."""

from __future__ import annotations

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


def comparison_curves(report: Mapping[str, Any], against: str, path: Path) -> None:
    """A row a backbone, a panel a reward: every training's mean by ``seconds`` or denoiser ``passes``, seeds thin."""
    backbones = list(dict.fromkeys(row["backbone"] for row in report["rows"]))
    rewards = list(report["rows"][0]["after"])
    colours = [BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY]
    labels = list(dict.fromkeys(row["label"] for row in report["rows"]))
    with open_figure(path, 4 * len(rewards), 3.2 * len(backbones)) as figure:
        for place, backbone in enumerate(backbones):
            for column, reward in enumerate(rewards):
                axes = figure.add_subplot(len(backbones), len(rewards), place * len(rewards) + column + 1)
                for row in (row for row in report["rows"] if row["backbone"] == backbone):
                    # a stopped training has its plain one's colour, dashed
                    own = next((r["label"] for r in report["rows"] if r["row"] == row["beside"]), row["label"])
                    colour = colours[labels.index(own) % len(colours)]
                    for number, curve in enumerate(row["curves"]):
                        style = "--" if row["beside"] else "-"
                        label = None if number else row["label"]
                        axes.plot(curve[against], curve[reward], style, color=colour, label=label, linewidth=1)
                words = "seconds of training" if against == "seconds" else "denoiser passes"
                decorate(axes, f"{backbone}: {reward}", words, "mean")
                if place == column == 0:
                    axes.legend(fontsize=7)
