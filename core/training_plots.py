"""Pictures of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import BLUE, GREEN, ORANGE, decorate, open_figure


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
