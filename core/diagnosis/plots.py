"""The picture of a diagnosis: ranking, calibration, gradient and cost of every estimator, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, decorate, open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#D55E00", BLACK)
_MARKERS = "os^Dv<>P"
_BARS: dict[str, Any] = {"capsize": 3, "markersize": 4}
_SLOPES = (-1.0, 3.0)
"""What the slope's panel shows at most: where a value hardly varies, slope and error have no bound."""


def diagnosis_panels(report: Mapping[str, Any], kernel: str, path: Path) -> None:
    """Rank correlation, calibration slope and gradient cosine against the noise level, what judges will say, and
    seconds a latent.

    ``report`` is ``Diagnosis.report()`` and ``kernel`` what its trajectories are called. A diagnosis without gradients
    has no panel of them, one without judges none of those.
    """
    judges = [name for name, found in report["judges"].items() if found["ranks"] is not None]
    panels = 3 + bool(report["reference"]) + len(judges)
    columns = 2 if panels <= 4 else 3
    lines = math.ceil(panels / columns)
    with open_figure(path, 5.5 * columns, 4 * lines) as figure:
        places = iter(range(1, panels + 1))
        ranks, slopes = (figure.add_subplot(lines, columns, next(places)) for _ in range(2))
        _lines(ranks, report, "rank")
        ranks.axhline(0, color=GREY, linewidth=0.8)
        ranks.set_ylim(min(-0.1, ranks.get_ylim()[0]), 1.05)
        decorate(ranks, "Which seed of a prompt will end best", "noise level sigma", "rank correlation in a prompt")
        _lines(slopes, report, "within_slope")
        slopes.axhline(1, color=BLACK, linestyle="--", linewidth=0.8)
        low, high = slopes.get_ylim()
        slopes.set_ylim(max(_SLOPES[0], min(low, 0.0)), min(_SLOPES[1], max(high, 1.5)))
        decorate(slopes, "Reward gained per unit of value (1: calibrated)", "noise level sigma", "slope in a prompt")
        if report["reference"] is not None:
            _gradients(figure.add_subplot(lines, columns, next(places)), report)
        for name in judges:
            _judgement(figure.add_subplot(lines, columns, next(places)), report, name)
        _costs(figure.add_subplot(lines, columns, next(places)), report["estimators"])
        handles, labels = ranks.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
        counts = f"{report['prompts']} prompts with {report['seeds']} seeds"
        figure.suptitle(f"Value estimators along {kernel} samples, {counts}, ± one standard error", fontsize=13)


def _styles(names: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    return zip(names, cycle(_COLOURS), cycle(_MARKERS), strict=False)


def _lines(axes: Axes, report: Mapping[str, Any], figure: str) -> None:
    """One line an estimator, broken where the figure is not defined."""
    for name, colour, marker in _styles(report["estimators"]):
        found = report["estimators"][name]
        levels = [math.nan if level is None else level for level in found[figure]]
        errors = [error or 0.0 for error in found[f"{figure}_stderr"]]
        axes.errorbar(report["sigma"], levels, errors, color=colour, marker=marker, label=name, **_BARS)


def _gradients(axes: Axes, report: Mapping[str, Any]) -> None:
    """The cosine of every estimator's gradient, below what an exact one would reach."""
    reference = report["reference"]
    _lines(axes, report, "cosine")
    label = f"exact gradient, about ({reference['rollouts']} rollouts)"
    line = axes.plot(report["sigma"], reference["ceiling"], color=BLACK, linestyle="--", label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.legend(handles=line, frameon=False, fontsize=8)
    decorate(axes, "Gradient beside that of many rollouts", "noise level sigma", "mean cosine")


def _judgement(axes: Axes, report: Mapping[str, Any], judge: str) -> None:
    """How every estimator ranks a prompt's seeds as the judge will, below how their final rewards do."""
    found = report["judges"][judge]
    for name, colour, marker in _styles(report["estimators"]):
        levels = found["ranks"][name]
        means, errors = [level["mean"] for level in levels], [level["stderr"] or 0.0 for level in levels]
        axes.errorbar(report["sigma"], means, errors, color=colour, marker=marker, **_BARS)
    line = axes.axhline(found["rank"]["mean"], color=BLACK, linestyle="--", label="the final reward itself")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.legend(handles=[line], frameon=False, fontsize=8)
    decorate(axes, f"Which seed the {judge} will like best", "noise level sigma", "rank correlation in a prompt")


def _costs(axes: Axes, estimators: Mapping[str, Any]) -> None:
    """Milliseconds a latent, on a logarithmic axis where they differ tenfold: full bars forward, pale ones with the
    gradient."""
    from matplotlib.ticker import LogLocator, NullFormatter

    least, most = math.inf, 0.0
    for row, (name, colour, _) in enumerate(_styles(estimators)):
        cost = estimators[name]["cost"]
        for place, (kind, alpha) in enumerate((("forward", 1.0), ("gradient", 0.45))):
            if kind in cost:
                time = max(1000 * cost[kind]["seconds"], 1e-3)
                least, most = min(least, time), max(most, time)
                axes.barh(row + 0.36 * place, time, height=0.34, color=colour, alpha=alpha)
                axes.annotate(f" {time:.3g}", (time, row + 0.36 * place), va="center", fontsize=8)
    axes.margins(x=0.25)
    if most >= 10 * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        # a bar that began at about the shortest one's own length would make a half look like nothing
        axes.set_xlim(left=10 ** math.floor(math.log10(least / 2)))
    axes.set_yticks([row + 0.18 for row in range(len(estimators))], list(estimators))
    axes.invert_yaxis()
    decorate(axes, "What one latent costs (pale: with its gradient)", "milliseconds")
