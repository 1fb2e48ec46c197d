"""Pictures of a reproduced table: a panel a pair of backbone and reward, in the colours of :mod:`stitchvm.core.plots`.

Every function takes what ``TABLE.json`` holds and writes the file whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plots import BLACK, BLUE, GREEN, GREY, ORANGE, decorate, open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

_COLOURS = {"none": GREY, "tweedie": ORANGE, "stitched": BLUE}
_CURVES = {
    "tweedie": ("Tweedie", ORANGE, "s"), "stitched": ("stitched value", BLUE, "o"),
    "particles": ("N particles, M = 1", GREEN, "^"), "proposals": ("N particles, M proposals", BLUE, "o"),
}  # fmt: skip
"""What people read, colour and marker of every curve."""


def reward_bars(report: Mapping[str, Any], path: Path) -> None:
    """A line of panels a pair: the gain in every reward over the plain sampler, the target's first, and the detector.

    Bars carry one standard error; the best strength of a sweep is starred.
    """
    pairs = _pairs(report)
    others = max(len(report["rewards"]) - 1, 0)
    most = max(len(rows) for _, rows in pairs)
    size = (max(6.5, 3 + 2.9 * (2 + others)), len(pairs) * (1.1 + 0.28 * most) + 0.6)
    with open_figure(path, *size) as figure:
        table = figure.subplots(len(pairs), 2 + others, squeeze=False)
        for line, ((backbone, reward), rows) in zip(table, pairs, strict=True):
            measured = [reward, *(name for name in report["rewards"] if name != reward)]
            for axes, name in zip(line, measured, strict=False):
                _bars(axes, rows, [row["gains"][name] for row in rows])
                axes.axvline(0, color=BLACK, linewidth=0.8)
                axes.locator_params(axis="x", nbins=4)  # long decimals would run into each other
                title = f"{backbone} steered by {reward}" if name == reward else f"meanwhile {name}"
                decorate(axes, title, f"paired gain in {name} ± s.e.", size=9)
            _bars(line[-1], rows, [row["detector"] for row in rows])
            line[-1].set_xlim(0, 1)
            decorate(line[-1], "pictures that show their prompt", "share ± s.e.", size=9)
            for axes in line[1:]:
                axes.set_yticklabels([])
        figure.suptitle(_title(report), fontsize=12)


def sweep_curves(report: Mapping[str, Any], path: Path) -> None:
    """A panel a pair: mean target reward against the share of prompts that the detector sees fulfilled, a curve an
    estimator, its points the strengths. Without a detector, against the strength."""

    def draw(axes: Axes, rows: Rows, reward: str) -> None:
        seen = all(row["detector"] is not None for row in rows)
        unguided = [row for row in rows if row["curve"] is None]
        for row, marker, line in zip(unguided, "*P", (":", "--"), strict=False):
            y = row["scores"][reward]["mean"]
            if seen:
                x = row["detector"]["mean"]
                axes.scatter([x], [y], color=GREY, marker=marker, zorder=3, label=row["label"])
            else:
                axes.axhline(y, color=GREY, linestyle=line, label=row["label"])
        where = (lambda row: row["detector"]["mean"]) if seen else (lambda row: row["at"])
        _curves(axes, rows, reward, where, lambda row: f"{row['at']:g}" + ("*" if row["best"] else ""))
        if not seen:
            axes.set_xscale("log")
        axes.set_xlabel("share of prompts fulfilled (detector)" if seen else "strength")

    _panels(report, path, 1, [draw])


def cost_curves(report: Mapping[str, Any], path: Path) -> None:
    """Two panels a pair: mean target reward against seconds a prompt, and against denoiser passes a prompt (of all
    networks in a denoiser pass's operations, where these are known)."""

    def seconds(row: Mapping[str, Any]) -> float:
        return float(row["cost"]["seconds"]) / int(row["prompts"])

    def passes(row: Mapping[str, Any]) -> float:
        total = row["equivalents"]
        return (row["cost"].get("denoiser", 0) if total is None else total) / row["prompts"]

    def against(where: Callable[[Mapping[str, Any]], float], label: str) -> Callable[[Axes, Rows, str], None]:
        def draw(axes: Axes, rows: Rows, reward: str) -> None:
            for row in rows:
                if row["curve"] is None:
                    axes.axhline(row["scores"][reward]["mean"], color=GREY, linestyle=":", label=row["label"])
            _curves(axes, rows, reward, where, _size)
            axes.set_xlabel(label)

        return draw

    known = all(row["equivalents"] is not None for row in report["rows"])
    label = "forward passes a prompt, in denoiser passes" if known else "denoiser passes a prompt"
    _panels(report, path, 2, [against(seconds, "seconds a prompt"), against(passes, label)])


def _size(row: Mapping[str, Any]) -> str:
    proposals = row["settings"].get("proposals", 1)
    return f"{row['at']:g}" + (f",{proposals}" if proposals > 1 else "")


def _panels(report: Mapping[str, Any], path: Path, each: int, draw: Sequence[Callable[..., None]]) -> None:
    """``each`` panels a pair, side by side, with a common legend."""
    pairs = _pairs(report)
    with open_figure(path, 1 + 5.2 * each, 0.8 + 3.2 * len(pairs)) as figure:
        table = figure.subplots(len(pairs), each, squeeze=False)
        for line, ((backbone, reward), rows) in zip(table, pairs, strict=True):
            for axes, one in zip(line, draw, strict=True):
                one(axes, rows, reward)
                decorate(axes, f"{backbone}, {reward}", axes.get_xlabel(), f"mean {reward} ± s.e.", size=9)
                axes.legend(frameon=False, fontsize=7)
        figure.suptitle(_title(report), fontsize=12)


def _curves(
    axes: Axes,
    rows: Rows,
    reward: str,
    where: Callable[[Mapping[str, Any]], float],
    label: Callable[[Mapping[str, Any]], str],
) -> None:
    """A line a curve of rows, in the order of the table, each point labelled, with the reward's standard error."""
    for name, (words, colour, marker) in _CURVES.items():
        points = [row for row in rows if row["curve"] == name]
        x, y = [where(row) for row in points], [row["scores"][reward]["mean"] for row in points]
        errors = [row["scores"][reward]["stderr"] or 0 for row in points]
        if points:
            axes.errorbar(x, y, yerr=errors, color=colour, marker=marker, capsize=3, label=words)
        for row, left, height in zip(points, x, y, strict=True):
            axes.annotate(label(row), (left, height), (4, 4), textcoords="offset points", fontsize=7)


def _bars(axes: Axes, rows: Rows, values: Sequence[Mapping[str, float | None] | None]) -> None:
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is not None:
            colour = _COLOURS[row["value"]]
            axes.barh(place, value["mean"] or 0.0, xerr=value["stderr"] or 0.0, color=colour, capsize=3, height=0.65)
    axes.set_yticks(range(len(rows)), [row["label"] + (" *" if row["best"] else "") for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _pairs(report: Mapping[str, Any]) -> list[tuple[tuple[str, str], Rows]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((row["backbone"], row["reward"]), []).append(row)
    return list(found.items())


def _title(report: Mapping[str, Any]) -> str:
    partial = f" (partial: {report['measured']} of {report['expected']} rows)" if report["partial"] else ""
    return f"{report['title']}, {report['world']}, {report['settings']['prompts']} prompts a row{partial}"
