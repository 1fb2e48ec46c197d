"""Pictures of results as PNG files: readable at a glance, in colours that colour-blind readers can tell apart.

Every function takes a result in its JSON form and writes the file whole or not at all (``OutputError`` when it cannot).
Matplotlib is imported on first use, and its global state stays as it was.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

METHODS = {
    "base": "plain sampler",
    "best_of_n": "best-of-N",
    "fk_tweedie": "FK, Tweedie",
    "fk_stitched": "FK, stitched",
}
"""The steering methods of a summary, in the order they are shown, and what people read."""

# Okabe and Ito's colours; markers differ too, for print in grey.
BLUE, ORANGE, GREEN, PURPLE, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8A8A8A", "#222222"
_LINES = {"stitched": (BLUE, "o"), "tweedie": (ORANGE, "s"), "vae": (PURPLE, "^")}
ESTIMATORS = {"stitched": "stitched value", "tweedie": "Tweedie", "vae": "VAE stitching"}
_BARS = {"base": GREY, "best_of_n": GREEN, "fk_tweedie": ORANGE, "fk_stitched": BLUE}
_DPI = 150
_CELL = 128
"""Default width of one picture in an image grid, in pixels."""


@contextmanager
def open_figure(path: Path, width: float, height: float, dpi: int = _DPI) -> Iterator[Figure]:
    """A figure of ``width`` x ``height`` inches that is written to ``path`` on leaving."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    yield figure
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def decorate(axes: Axes, title: str, x: str = "", y: str = "", size: int = 11) -> None:
    # a name or prompt with dollar signs in it is no formula
    axes.set_title(title, fontsize=size, loc="left", parse_math=False, wrap=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def place(cut: int) -> str:
    """Where a backbone cut is, in words that follow "cut"."""
    return {-1: "at the latent itself", 0: "after the backbone's stem"}.get(cut, f"after backbone block {cut}")


def interface_heatmap(report: Mapping[str, Any], path: Path) -> None:
    """The search's losses by the chosen criterion: a column a backbone cut, a row a reward block, the best outlined.

    ``report`` is ``SearchResult.report()``.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    criterion, best = report["criterion"], report["best"]
    loss = {(cell["i"], cell["j"]): cell[criterion] for cell in report["grid"]}
    cuts, blocks = sorted({i for i, _ in loss}), sorted({j for _, j in loss})
    table = [[loss.get((i, j), math.nan) for i in cuts] for j in blocks]
    with open_figure(path, max(6.5, 1.5 + 0.62 * len(cuts)), max(3.0, 1.8 + 0.5 * len(blocks))) as figure:
        axes = figure.subplots()
        norm = Normalize(min(loss.values()), max(loss.values()))
        picture = axes.imshow(table, cmap="cividis", norm=norm, aspect="auto")
        for row, j in enumerate(blocks):
            for column, i in enumerate(cuts):
                if (i, j) in loss:
                    colour = "white" if norm(loss[i, j]) < 0.55 else "black"
                    axes.text(column, row, f"{loss[i, j]:.3g}", ha="center", va="center", color=colour, fontsize=8)
        corner = (cuts.index(best["i"]) - 0.5, blocks.index(best["j"]) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=3, clip_on=False, zorder=3))
        axes.set_xticks(range(len(cuts)), [str(i) for i in cuts])
        axes.set_yticks(range(len(blocks)), [str(j) for j in blocks])
        title = f"The best place to join is {place(best['i'])}, before reward block {best['j']}"
        decorate(axes, title, "backbone cut i", "reward block j")
        figure.colorbar(picture, ax=axes, label=f"{criterion} loss (lower is better)")


def recall_curve(retrieval: Mapping[str, Any], path: Path) -> None:
    """Recall@1 against the noise level; the clean reward is a dashed line.

    ``retrieval`` holds ``sigma[]``, ``clean`` and a list by model: ``stitched`` and, where there is one, ``vae``.
    """
    sigmas, clean = retrieval["sigma"], retrieval["clean"]
    middle = min(range(len(sigmas)), key=lambda k: abs(sigmas[k] - 0.5))
    kept = retrieval["stitched"][middle] / clean if clean else 0.0
    with open_figure(path, 6.5, 4) as figure:
        axes = figure.subplots()
        axes.axhline(clean, color=BLACK, linestyle="--", label="clean reward (no noise)")
        for name in ("stitched", "vae"):
            if name in retrieval:
                colour, marker = _LINES[name]
                axes.plot(sigmas, retrieval[name], color=colour, marker=marker, label=ESTIMATORS[name])
        axes.set_ylim(0, 1.05)
        title = f"At sigma {sigmas[middle]:g} the stitched value keeps {kept:.0%} of the clean reward's recall"
        decorate(axes, title, "noise level sigma", "retrieval recall@1")
        axes.legend(frameon=False, loc="lower left")


SKILLS = {
    "recall": "retrieval recall@1", "preference": "preference accuracy", "rank": "rank correlation",
    "similarity": "embedding similarity",
}  # fmt: skip
"""The metrics of rewards, and what people read."""


def percent(share: float | None) -> str:
    """A share in whole percent; a dash where it is undefined."""
    return "–" if share is None else f"{share:.0%}"


def skill_curve(skill: Mapping[str, Any], path: Path) -> None:
    """One reward's metric against the noise level; ``skill`` is ``Skill.report()`` with the model ``stitched``."""
    with open_figure(path, 6.5, 4) as figure:
        axes = figure.subplots()
        _skill(axes, skill)
        sigma, kept = _kept(skill, 0.5)
        title = f"At sigma {sigma:g} the stitched value keeps {kept['stitched']} of the clean reward's skill"
        decorate(axes, title, "noise level sigma", SKILLS[skill["metric"]])
        axes.legend(frameon=False, loc="lower left")


def skill_panels(report: Mapping[str, Any], path: Path) -> None:
    """A panel a pair: a row a backbone, a column a reward, its metric against the noise level.

    ``report`` is what ``matrix.json`` holds. Backbones and rewards without any measured pair are left out; a partial
    matrix says so.
    """
    cells = {(cell["backbone"], cell["reward"]): cell for cell in report["cells"]}
    backbones = [name for name in report["backbones"] if any(name == b for b, _ in cells)]
    rewards = [name for name in report["rewards"] if any(name == r for _, r in cells)]
    with open_figure(path, max(6.5, 1 + 3.3 * len(rewards)), 1.4 + 2.5 * len(backbones)) as figure:
        table = figure.subplots(len(backbones), len(rewards), squeeze=False, sharex=True)
        for line, backbone in zip(table, backbones, strict=True):
            for axes, reward in zip(line, rewards, strict=True):
                _panel(axes, cells.get((backbone, reward)), backbone, reward)
        for axes in table[-1]:
            axes.set_xlabel("noise level sigma")
        drawn = [axes.get_legend_handles_labels() for line in table for axes in line if axes.lines]
        handles, labels = max(drawn, key=lambda found: len(found[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        partial = f" (partial: {report['measured']} of {report['pairs']} pairs)" if report["partial"] else ""
        figure.suptitle(f"What noisy latents keep of each reward's skill, {report['world']}{partial}", fontsize=13)


def _panel(axes: Axes, cell: Mapping[str, Any] | None, backbone: str, reward: str) -> None:
    name = f"{backbone} x {reward}"
    if cell is None:
        decorate(axes, f"{name}\nnot measured", size=9)
        axes.set_yticks([])
        return
    _skill(axes, cell)
    sigma, kept = _kept(cell, 0.25)
    title = f"{name}\n{cell['metric']}: {kept['stitched']} kept at sigma {sigma:g}, VAE {kept['vae']}"
    decorate(axes, title, "", SKILLS[cell["metric"]], size=9)


def _skill(axes: Axes, skill: Mapping[str, Any]) -> None:
    """The lines of one reward: clean dashed, chance dotted, and every model there is."""
    axes.axhline(skill["clean"], color=BLACK, linestyle="--", label="clean reward (no noise)")
    for name in ("stitched", "vae"):
        if name in skill:
            colour, marker = _LINES[name]
            axes.plot(skill["sigma"], skill[name], color=colour, marker=marker, label=ESTIMATORS[name])
    if skill["chance"] is not None:
        axes.axhline(skill["chance"], color=GREY, linestyle=":", label="chance")
    lowest = min(skill["chance"] or 0, *(min(skill[name]) for name in ("stitched", "vae") if name in skill))
    axes.set_ylim(0.45 if skill["metric"] == "preference" and lowest >= 0.45 else min(0, lowest - 0.05), 1.05)


def _kept(skill: Mapping[str, Any], level: float) -> tuple[float, dict[str, str]]:
    """The measured noise level closest to ``level``, and what each model keeps there, in words."""
    k = min(range(len(skill["sigma"])), key=lambda k: abs(skill["sigma"][k] - level))
    return skill["sigma"][k], {name: percent(shares[k]) for name, shares in skill["retention"].items()}


def ranking_curve(ranking: Mapping[str, Any], path: Path) -> None:
    """Within-prompt Spearman correlation with the final reward, against the noise level.

    ``ranking`` is ``Ranking.report()``: ``sigma[]``, a list by estimator, and their ``stderr``.
    """
    with open_figure(path, 6.5, 4) as figure:
        axes = figure.subplots()
        for name in ("stitched", "tweedie"):
            if name not in ranking:
                continue
            colour, marker = _LINES[name]
            errors = [error or 0.0 for error in ranking["stderr"][name]]
            label = ESTIMATORS[name]
            axes.errorbar(
                ranking["sigma"], ranking[name], yerr=errors, color=colour, marker=marker, capsize=3, label=label
            )
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_ylim(min(-0.1, axes.get_ylim()[0]), 1.05)
        title = "How well each value foresees which seed of a prompt will end best"
        decorate(axes, title, "noise level sigma", "rank correlation within a prompt")
        axes.legend(frameon=False, loc="lower left")


def steering_bars(steering: Mapping[str, Any], path: Path) -> None:
    """Reward gain over the plain sampler, with standard error and cost, and how many captions each method fulfils.

    ``steering`` is that table of a quickstart summary; a missing detector leaves its panel out.
    """
    methods = [name for name in METHODS if name in steering]
    gained = [name for name in methods if steering[name].get("gain")]
    seen = [name for name in methods if steering[name].get("detector")]
    with open_figure(path, 9 if seen else 5.5, 1.6 + 0.62 * len(methods)) as figure:
        panels = figure.subplots(1, 2 if seen else 1, squeeze=False)[0]
        _bars(panels[0], gained, [steering[name]["gain"] for name in gained])
        for row, name in enumerate(gained):
            gain = steering[name]["gain"]
            reach = max(gain["mean"] + (gain["stderr"] or 0), 0)
            text = _effort(steering[name]["cost"])
            panels[0].annotate(text, (reach, row), (6, 0), textcoords="offset points", va="center", fontsize=8)
        panels[0].axvline(0, color=BLACK, linewidth=0.8)
        panels[0].margins(x=0.6)  # room for what each one costs
        count = steering.get("prompts")
        title = "Reward gained over the plain sampler" + (f", {count} prompts" if count else "")
        decorate(panels[0], title, "paired gain ± one standard error; passes and seconds in words")
        if seen:
            _bars(panels[1], seen, [steering[name]["detector"] for name in seen])
            panels[1].set_xlim(0, 1)
            decorate(panels[1], "Captions that the picture fulfils", "share ± one standard error")


def _bars(axes: Axes, names: Sequence[str], values: Sequence[Mapping[str, float | None]]) -> None:
    means = [value["mean"] or 0.0 for value in values]
    errors = [value["stderr"] or 0.0 for value in values]
    axes.barh(range(len(names)), means, xerr=errors, color=[_BARS[name] for name in names], capsize=4, height=0.6)
    axes.set_yticks(range(len(names)), [METHODS[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _effort(cost: Mapping[str, float]) -> str:
    parts = [f"{int(cost[kind]):,} {kind}" for kind in ("denoiser", "head", "decoder") if cost.get(kind)]
    parts.append(f"{cost['seconds']:.0f} s")
    return "\n".join(", ".join(parts[n : n + 2]) for n in range(0, len(parts), 2))


def loss_curve(losses: Sequence[float], path: Path) -> None:
    """The finetune loss by step, and its running mean; raises :class:`ConfigError` for an empty list."""
    if not losses:
        raise ConfigError("there is no loss to plot.")
    window = max(1, len(losses) // 25)
    parts = [losses[max(0, step + 1 - window) : step + 1] for step in range(len(losses))]
    smooth = [math.fsum(part) / len(part) for part in parts]
    with open_figure(path, 6.5, 3.5) as figure:
        axes = figure.subplots()
        axes.plot(losses, color=BLUE, alpha=0.3, linewidth=0.8, label="each step")
        axes.plot(smooth, color=BLUE, linewidth=2, label=f"mean of {window} steps")
        title = f"The finetune loss goes from {smooth[0]:.3g} to {smooth[-1]:.3g} in {len(losses)} steps"
        decorate(axes, title, "step", "distillation loss")
        axes.legend(frameon=False)


def image_grid(rows: Mapping[str, Tensor], captions: Sequence[str], path: Path, scale: float | None = None) -> None:
    """A labelled table of images ``[N, 3, H, W]`` in [0, 1]: one row a method, one column a prompt.

    ``scale`` is the picture's pixels for a pixel of an image; by default an image is shown 128 pixels wide.
    Raises :class:`ConfigError` when a row and the captions differ in number.
    """
    for name, images in rows.items():
        if len(images) != len(captions):
            raise ConfigError(f"row {name!r} has {len(images)} images for {len(captions)} captions.")
    if not rows or not captions:
        raise ConfigError("an image grid needs at least one row and one caption.")
    height, width = next(iter(rows.values())).shape[-2:]
    scale = _CELL / width if scale is None else scale
    cell, tall = width * scale / 100, height * scale / 100
    wrapped = [textwrap.fill(caption, max(8, int(cell * 15)), max_lines=6, placeholder="…") for caption in captions]
    head = 0.15 + 0.125 * max(caption.count("\n") + 1 for caption in wrapped)
    size = (1.1 + len(captions) * (cell + 0.08), head + len(rows) * (tall + 0.08))
    with open_figure(path, *size, dpi=100) as figure:
        table = figure.subplots(len(rows), len(captions), squeeze=False)
        for line, (name, images) in zip(table, rows.items(), strict=True):
            for axes, image in zip(line, images, strict=True):
                axes.imshow(image.detach().clamp(0, 1).permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
            label = METHODS.get(name, name)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
        for axes, caption in zip(table[0], wrapped, strict=True):
            axes.set_title(caption, fontsize=7, parse_math=False)
