"""Plots are real pictures, say what they show, and are whole or not there."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from results import matrix_report, search_report, summary
from stitchvm.core import ConfigError, OutputError, plots
from stitchvm.core.diagnosis.plots import diagnosis_panels
from stitchvm.core.training.plots import comparison_curves

PICTURES = {
    "interface": lambda path: plots.interface_heatmap(search_report(), path),
    "recall": lambda path: plots.recall_curve(summary()["retrieval"], path),
    "skill": lambda path: plots.skill_curve(matrix_report()["cells"][0], path),
    "matrix": lambda path: plots.skill_panels(matrix_report(), path),
    "ranking": lambda path: plots.ranking_curve(summary()["ranking"], path),
    "steering": lambda path: plots.steering_bars(summary()["steering"], path),
    "loss": lambda path: plots.loss_curve([1 / (1 + n) for n in range(50)], path),
    "images": lambda path: plots.image_grid({"base": torch.rand(2, 3, 16, 16)}, ["a red circle", "a star"], path),
}


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, to ask it what it shows."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def texts(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", PICTURES)
def test_a_plot_is_a_real_picture(name, tmp_path):
    PICTURES[name](tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    assert min(image.shape[:2]) > 150
    assert image.std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", PICTURES)
def test_an_unwritable_place_is_one_error(name, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        PICTURES[name](tmp_path / "missing" / "a.png")


def test_matplotlib_is_left_alone(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    PICTURES["recall"](tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_the_heatmap_outlines_the_best_cell_and_names_it(tmp_path, figures):
    from matplotlib.patches import Rectangle

    plots.interface_heatmap(search_report(), tmp_path / "a.png")
    axes = figures[0].axes[0]
    outline = next(patch for patch in axes.patches if isinstance(patch, Rectangle))
    assert outline.get_xy() == (1.5, -0.5), "cut 3 is the third column, block 1 the first row"
    assert axes.get_title(loc="left") == "The best place to join is after backbone block 3, before reward block 1"
    assert "functional" in texts(figures[0])
    assert "0.25" in texts(figures[0])


@pytest.mark.parametrize(("cut", "words"), [(-1, "at the latent itself"), (0, "after the backbone's stem")])
def test_a_single_pair_can_be_drawn(cut, words, tmp_path, figures):
    cell = {"i": cut, "j": 2, "functional": 0.5}
    report = {**search_report(), "grid": [cell], "best": {"i": cut, "j": 2}}
    plots.interface_heatmap(report, tmp_path / "a.png")
    assert words in texts(figures[0])


def test_recall_says_what_is_kept_and_shows_clean_as_a_dashed_line(tmp_path, figures):
    plots.recall_curve(summary()["retrieval"], tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert "At sigma 0.5 the stitched value keeps 89%" in axes.get_title(loc="left")
    clean = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert set(clean.get_ydata()) == {0.843}
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert curves["stitched value"] == summary()["retrieval"]["stitched"]
    assert curves["VAE stitching"] == summary()["retrieval"]["vae"]


def test_panels_stand_in_the_matrix_s_order_and_say_what_is_kept(tmp_path, figures):
    plots.skill_panels(matrix_report(), tmp_path / "a.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == [
        "net-a x taste\npreference: 87% kept at sigma 0.25, VAE 61%", "net-a x words\nnot measured",
        "net-b x taste\npreference: 87% kept at sigma 0.25, VAE 61%",
        "net-b x words\nrecall: 87% kept at sigma 0.25, VAE 61%",
    ]  # fmt: skip
    assert "partial: 3 of 6 pairs" in texts(figures[0])
    panel, cell = figures[0].axes[3], matrix_report()["cells"][2]
    curves = {line.get_label(): line for line in panel.lines}
    assert list(curves["stitched value"].get_ydata()) == cell["stitched"]
    assert list(curves["VAE stitching"].get_ydata()) == cell["vae"]
    clean = curves["clean reward (no noise)"]
    assert clean.get_linestyle() == "--" and set(clean.get_ydata()) == {0.8}
    assert set(curves["chance"].get_ydata()) == {0.01}


def test_a_skill_that_cannot_be_kept_is_a_dash_and_no_chance_no_line(tmp_path, figures):
    skill = {**matrix_report()["cells"][0], "metric": "similarity", "chance": None, "clean": 0.0}
    skill["retention"] = {"stitched": [None, None, None]}
    del skill["vae"]
    plots.skill_curve(skill, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert "At sigma 0.25 the stitched value keeps –" in axes.get_title(loc="left"), "0.25 and 0.75 are as close"
    assert [line.get_label() for line in axes.lines] == ["clean reward (no noise)", "stitched value"]


def test_bars_show_gains_with_errors_and_costs(tmp_path, figures):
    plots.steering_bars(summary()["steering"], tmp_path / "a.png")
    gains, shown = figures[0].axes
    assert [bar.get_width() for bar in gains.patches] == [0.0211, 0.0321, 0.0303]
    assert [bar.get_width() for bar in shown.patches] == [0.54, 0.66, 0.7, 0.72]
    for words in ("10,753 denoiser", "2,304 head", "1,344 decoder", "82 s", "FK, stitched", "plain sampler"):
        assert words in texts(figures[0])


def test_a_missing_detector_leaves_its_panel_out(tmp_path, figures):
    table = summary()["steering"]
    for name in plots.METHODS:
        table[name]["detector"] = None
    table["fk_stitched"]["gain"] = {"mean": -0.01, "stderr": None}
    plots.steering_bars(table, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches][-1] == -0.01


@pytest.mark.parametrize(("longer", "begin"), [(27, 0), (270, 1)])
def test_bars_of_costs_begin_at_nothing_or_well_below_the_shortest(tmp_path, figures, longer, begin):
    lines = {f"{name}{error}": [0.5] for name in ("rank", "within_slope") for error in ("", "_stderr")}
    estimators = {
        name: {**lines, "cost": {"forward": {"seconds": s}}} for name, s in (("a", 0.011), ("b", longer / 1000))
    }
    report = {"sigma": [0.5], "prompts": 2, "seeds": 2, "reference": None, "estimators": estimators, "judges": {}}
    diagnosis_panels(report, "ode", tmp_path / "a.png")
    costs = figures[0].axes[-1]
    assert costs.get_xlim()[0] == begin and [bar.get_width() for bar in costs.patches] == [11, longer]
    assert costs.get_xlim()[1] > longer


def test_the_loss_curve_smooths_and_refuses_nothing(tmp_path, figures):
    losses = [2.0 if n % 2 else 1.0 for n in range(100)]
    plots.loss_curve(losses, tmp_path / "a.png")
    raw, smooth = (list(line.get_ydata()) for line in figures[0].axes[0].lines)
    assert raw == losses
    assert max(smooth[4:]) - min(smooth[4:]) < 0.6 < max(raw) - min(raw)
    assert all(math.isfinite(value) for value in smooth)
    with pytest.raises(ConfigError, match="no loss"):
        plots.loss_curve([], tmp_path / "b.png")


def test_the_image_grid_has_a_row_a_method_and_a_column_a_prompt(tmp_path, figures):
    red, blue = torch.zeros(2, 3, 1, 8, 8)
    red[0], blue[2] = 1, 1
    rows = {"base": torch.stack([red, blue, red]).squeeze(2), "mine": torch.stack([blue, blue, red]).squeeze(2)}
    captions = ["for $x^{$", "<b>bold</b> & more", "very " * 60]
    plots.image_grid(rows, captions, tmp_path / "a.png", scale=10)
    table = [axes for axes in figures[0].axes if axes.images]
    colours = [axes.images[0].get_array()[0, 0].tolist() for axes in table]
    assert colours == [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]
    written = texts(figures[0]).replace("\n", " ")
    for words in ("plain sampler", "mine", "<b>bold</b>", "$x^{$", "…"):
        assert words in written
    image = pixels(tmp_path / "a.png").astype(int)
    assert (np.abs(image - [255, 0, 0]).sum(-1) < 30).sum() >= 3 * 60 * 60


def test_a_grid_of_unequal_rows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'mine' has 2 images for 3 captions"):
        plots.image_grid({"mine": torch.zeros(2, 3, 4, 4)}, ["a", "b", "c"], tmp_path / "a.png")
    with pytest.raises(ConfigError, match="at least one"):
        plots.image_grid({}, [], tmp_path / "a.png")


def trained(row, beside, *seeds):
    curves = [{"seconds": [0.0, 1.0], "r": [0.1, 0.2]} for _ in seeds]
    return {"backbone": "b", "row": row, "label": row, "beside": beside, "after": {"r": {}}, "curves": curves}


@pytest.mark.parametrize(("rows", "looks"), [
    ([trained("nft", None, 0, 1), trained("nft-stopped", "nft", 0, 1), trained("grpo", None, 0)],
     [("nft", "nft", "-"), ("nft-stopped", "nft", "--"), ("grpo", "grpo", "-")]),
    ([trained("nft", None, 0), trained("nft-2-12", "nft", 0), trained("nft-12-17", "nft", 0)],
     [("nft", "nft", "-"), ("nft-2-12", "nft-2-12", "--"), ("nft-12-17", "nft-12-17", "--")]),
    ([trained("nft-stopped", "nft", 0), trained("draft", None, 0)],
     [("nft-stopped", "nft-stopped", "--"), ("draft", "draft", "-")]),
], ids=["one stopped form", "several windows", "the plain one missing"])  # fmt: skip
def test_a_stopped_training_has_its_plain_one_s_colour_unless_others_have_it_too(rows, looks, tmp_path, figures):
    comparison_curves({"rows": rows}, "seconds", tmp_path / "curves.png")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert [name for name in drawn if not name.startswith("_")] == [name for name, _, _ in looks]
    assert [drawn[name] for name, _, _ in looks] == [(drawn[of][0], style) for _, of, style in looks]
    assert len({drawn[of][0] for _, of, _ in looks}) == len({of for _, of, _ in looks})
