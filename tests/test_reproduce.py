"""``stitchvm reproduce`` on toy networks: what a table holds, that its numbers are those of the runs behind it, what is
repeated, what fails, and which value models may steer which backbone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest

from analytic import GaussianBackbone
from pipelines import write_pipeline
from reward_families import aesthetic_architecture, write_aesthetic, write_dinov2
from stitchvm.core import StitchedValue, VariancePreservingPath, load_backbone, load_reward, registry
from stitchvm.core.latent_space import misfit
from stitchvm.core.reproduction import alignment_tables, plots, world_values
from stitchvm.core.reproduction.alignment_rows import TABLES, Pair, Settings
from stitchvm.core.reproduction.report import columns
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from test_matrix import toml
from toy_world import (
    BACKBONE,
    DATASET,
    DINO,
    OPTIONS,
    REWARDS,
    SCALE,
    alone,
    averaged,
    by_row,
    changed,
    pictures,
    redrawn,
    small,
)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """``one`` and three others: ``sister`` shares its autoencoder, ``stranger`` does not, ``elsewhere`` has another
    path."""
    folder = tmp_path_factory.mktemp("networks")
    write_pipeline(folder / "one")
    for name, part in (("sister", "transformer"), ("stranger", "vae")):
        shutil.copytree(folder / "one", folder / name)
        redrawn(folder / name / part / "diffusion_pytorch_model.safetensors")
    write_pipeline(folder / "elsewhere", "sd")
    write_aesthetic(folder / "clip")
    write_dinov2(folder / "dino")
    rewards = REWARDS.format(aesthetic=toml(aesthetic_architecture()))
    short = "{ max_sequence_length = 3 }"
    single = BACKBONE.format(name="one", family="mmdit", architecture=short)
    several = [BACKBONE.format(name=name, family="mmdit", architecture=short) for name in ("sister", "stranger")]
    several.append(BACKBONE.format(name="elsewhere", family="unet", architecture="{}"))
    (folder / "single.toml").write_text(single + rewards + DINO)
    (folder / "several.toml").write_text(single + "".join(several) + rewards)
    return folder


@pytest.fixture
def world(networks, install, fresh_registry) -> None:
    install("toy-data", {"toy_data": DATASET})
    registry().add(networks / "single.toml")


@pytest.fixture
def several(networks, install, fresh_registry) -> None:
    install("toy-data", {"toy_data": DATASET})
    registry().add(networks / "several.toml")


@pytest.fixture(scope="module")
def models(networks, tmp_path_factory) -> Path:
    """Value models, empty until a test has stitched some; the tests after it only read them."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def drawn() -> None:
    """For a test that looks at the pictures."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch) -> None:
    """The others are spared the time they take."""
    if "drawn" not in request.fixturenames:
        for name in ("reward_bars", "sweep_curves", "cost_curves"):
            monkeypatch.setattr(plots, name, lambda *_: None)


@pytest.fixture
def aligned(monkeypatch) -> list[str]:
    """The method of every call of ``align`` that is not answered by a cell."""
    return _seen(monkeypatch, alignment_tables, "align")


@pytest.fixture
def stitched(monkeypatch) -> list[str]:
    """The backbone of every call of ``stitch``."""
    return _seen(monkeypatch, world_values, "stitch")


def _seen(monkeypatch, module, name) -> list[Any]:
    seen: list[Any] = []
    real = getattr(module, name)

    def noted(first: Any, *rest: Any, **settings: Any) -> Any:
        seen.append(first)
        return real(first, *rest, **settings)

    monkeypatch.setattr(module, name, noted)
    return seen


def test_numbers_are_those_of_the_runs(world, models, tmp_path):
    """Scores, gains, detector and other rewards against a computation of their own from ``align`` and the pictures."""
    report = small("table1", tmp_path, models, rewards=["tiny-clip"])
    rows = by_row(report)
    assert list(rows) == ["plain", "kernel", "dps-tweedie-1", "dps-tweedie-5", "dps-stitched-2"]
    plain, guided = alone("sample", None), alone("dps", "tweedie", strength=5.0)
    row = rows["dps-tweedie-5"]
    assert rows["plain"]["scores"]["tiny-clip"] == averaged(plain.rewards)
    assert row["scores"]["tiny-clip"] == averaged(guided.rewards)
    assert row["gains"]["tiny-clip"] == averaged(guided.rewards - plain.rewards)
    shown, base = (pictures(one, tmp_path) for one in (row, rows["plain"]))
    judge = load_reward("tiny-aesthetic")
    other, before = (judge.rate(images, judge.condition(None)) for images in (shown, base))
    assert row["scores"]["tiny-aesthetic"] == averaged(other)
    assert row["gains"]["tiny-aesthetic"] == averaged(other - before)
    red, red_before = ((images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))).float() for images in (shown, base))
    assert row["detector"] == averaged(red) and row["detector_gain"] == averaged(red - red_before)
    for kind in ("denoiser", "decoder", "reward"):
        assert row["cost"][kind] == guided.cost[kind]
    value = StitchedValue.from_pretrained(models / "one--tiny-clip" / "stitched")
    stitched = alone("dps", value, strength=2.0)
    assert rows["dps-stitched-2"]["scores"]["tiny-clip"] == averaged(stitched.rewards)
    assert rows["dps-stitched-2"]["source"] == "one" and row["source"] is None


def test_a_table_is_the_same_as_json_csv_and_picture(world, drawn, models, run, tmp_path):
    code, out, err = run(
        "reproduce", "table1", "--world", "toy", "--out", tmp_path, *OPTIONS, "--rewards", "tiny-clip", "--values",
        models, "--strengths-tweedie", "1,5", "--strengths-stitched", "2", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((tmp_path / "table1.json").read_text()) == report
    with (tmp_path / "table1.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == columns(report) and len(lines) == len(report["rows"]) == 5
    for line, row in zip(lines, report["rows"], strict=True):
        assert (line["row"], line["reward"], line["best"]) == (row["row"], "tiny-clip", str(row["best"]))
        for name in ("target", "tiny-clip", "tiny-aesthetic", "detector"):
            key = "tiny-clip" if name == "target" else name
            figure = row["detector"] if name == "detector" else row["scores"][key]
            gain = row["detector_gain"] if name == "detector" else row["gains"][key]
            assert (float(line[name]), float(line[f"{name}_stderr"])) == (figure["mean"], figure["stderr"])
            assert line[f"{name}_gain"] == ("" if gain is None else str(gain["mean"]))
        assert int(line["denoiser_passes"]) == row["cost"]["denoiser"] and line["seed"] == "0"
    best = [row["row"] for row in report["rows"] if row["best"]]
    reward = {name: row["scores"]["tiny-clip"]["mean"] for name, row in by_row(report).items()}
    assert best == [max(("dps-tweedie-1", "dps-tweedie-5"), key=lambda name: reward[name]), "dps-stitched-2"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("table1", "table1-sweep"))
    assert report["partial"] and report["expected"] == 10 and report["measured"] == 5
    assert {row["reward"] for row in report["missing"]} == {"tiny-aesthetic"}
    assert report["rewards"] == ["tiny-aesthetic", "tiny-clip"]
    assert "reference images" in report["unfit_rewards"]["tiny-dino"]


def test_the_kernel_row_is_the_sampler_unsteered(world, models, tmp_path):
    """It reads no value, and guidance of next to no strength draws the same pictures."""
    settings = changed(strengths_tweedie=(1e-9,))
    rows = by_row(small("table1", tmp_path, models, rewards=["tiny-clip"], settings=settings))
    kernel, plain = rows["kernel"], rows["plain"]
    assert kernel["cost"]["denoiser"] == plain["cost"]["denoiser"] == 2 * 3 * 3
    assert kernel["cost"]["decoder"] == 3 and kernel["value"] == "none"
    assert kernel["scores"]["tiny-clip"]["mean"] != plain["scores"]["tiny-clip"]["mean"]
    weak = rows["dps-tweedie-1e-09"]["scores"]["tiny-clip"]
    assert weak["mean"] == pytest.approx(kernel["scores"]["tiny-clip"]["mean"], abs=1e-5)


def test_particle_methods_and_what_tables_share(world, models, tmp_path, aligned, stitched):
    settings = changed(methods=("svdd", "das"), options={"window": [0.3, 1.0]})
    rows = by_row(small("table2", tmp_path, models, rewards=["tiny-clip"], settings=settings))
    assert list(rows) == ["plain", "kernel", "best-of-2", "fk-tweedie-n2", "fk-stitched-n2", "fk-stitched-n2-m2",
                          "svdd-m2", "das-n2"]  # fmt: skip
    value = StitchedValue.from_pretrained(models / "one--tiny-clip" / "stitched")
    fk = alone("fk-steering", value, particles=2, proposals=2, strength=60.0, window=(0.3, 1.0))
    assert rows["fk-stitched-n2-m2"]["scores"]["tiny-clip"] == averaged(fk.rewards)
    assert rows["fk-stitched-n2-m2"]["cost"]["head"] == fk.cost["head"] > rows["fk-stitched-n2"]["cost"]["head"]
    assert rows["das-n2"]["settings"] == {"particles": 2, "strength": 60.0}
    assert rows["svdd-m2"]["settings"] == {"particles": 1, "proposals": 2}
    before = len(aligned)
    assert before == 8
    small("table1", tmp_path, models, rewards=["tiny-clip"])
    assert aligned[before:] == ["dps"] * 3, "the plain samplers are there already"
    small("table2", tmp_path, models, rewards=["tiny-clip"], settings=settings)
    assert len(aligned) == before + 3, "nothing is done twice"
    assert len(stitched) <= 1


def test_reward_against_cost(world, drawn, models, tmp_path, monkeypatch):
    from stitchvm.core.reproduction import alignment_rows

    names = [row.name for row in TABLES["fig3"].make(Settings(), Pair("recall"))]
    assert names == ["plain", *(f"fk-stitched-n{n}" for n in (1, 2, 4, 8, 14)), "fk-stitched-n4-m2",
                     "fk-stitched-n8-m2", "fk-stitched-n8-m6"]  # fmt: skip
    monkeypatch.setattr(alignment_rows, "CURVE", (1, 2))
    monkeypatch.setattr(alignment_rows, "PROPOSED", ((2, 2),))
    report = small("fig3", tmp_path, models, rewards=["tiny-clip"])
    rows = by_row(report)
    one, two = (rows[f"fk-stitched-n{n}"] for n in (1, 2))
    assert two["equivalents"] == pytest.approx(2 * one["equivalents"]), "twice the particles, twice the passes"
    assert rows["fk-stitched-n2-m2"]["equivalents"] > two["equivalents"]
    assert not any(row["best"] for row in report["rows"])
    assert (tmp_path / "fig3.png").stat().st_size > 10_000 and not (tmp_path / "fig3-sweep.png").exists()


def test_a_value_model_steers_a_backbone_of_the_same_latents_alone(several, models, tmp_path, stitched):
    settings = changed(proposals=1, options={"window": [0.3, 1.0]})
    chosen = ["one", "sister", "elsewhere"]
    report = small("table6", tmp_path, models, rewards=["tiny-clip"], backbones=chosen, settings=settings)
    own = "fk-stitched-n2"
    assert {row["backbone"]: None for row in report["rows"]} == dict.fromkeys(chosen)
    assert list(by_row(report, backbone="one")) == ["plain", own, f"{own}-from-sister"]
    assert list(by_row(report, backbone="elsewhere")) == ["plain", own]
    reasons = {(no["backbone"], no["row"]): no["reason"] for no in report["not_applicable"]}
    assert set(reasons) == {("one", f"{own}-from-elsewhere"), ("sister", f"{own}-from-elsewhere"),
                            ("elsewhere", f"{own}-from-one"), ("elsewhere", f"{own}-from-sister")}  # fmt: skip
    assert "lives on the variance-preserving path and one on the flow path" in reasons["one", f"{own}-from-elsewhere"]
    assert report["partial"], "rows by the backbone that was left out are missing"
    row = by_row(report, backbone="one")[f"{own}-from-sister"]
    assert row["source"] == "sister"
    value = StitchedValue.from_pretrained(models / "sister--tiny-clip" / "stitched")
    steered = alone("fk-steering", value, particles=2, strength=60.0, window=(0.3, 1.0))
    assert row["scores"]["tiny-clip"] == averaged(steered.rewards)
    assert steered.cost["head"] > 0 and "resumed" not in steered.cost, "another network's pass cannot be finished"
    assert len(stitched) <= 3


def test_which_latents_are_the_same(networks, several):
    one, sister, stranger = (load_backbone(name) for name in ("one", "sister", "stranger"))
    assert misfit(one, sister) is None and misfit(sister, one) is None
    assert "decode one latent to different pictures" in str(misfit(stranger, one))
    flow = GaussianBackbone()
    assert misfit(flow, GaussianBackbone(deviation=0.5), prompted=True) is None
    assert "3 latent channels and GaussianBackbone has 2" in str(misfit(flow, GaussianBackbone(channels=2)))
    assert "flow path" in str(misfit(flow, GaussianBackbone(path=VariancePreservingPath())))
    other = GaussianBackbone()
    other.encode_prompts = lambda prompts: one.encode_prompts(prompts)  # type: ignore[method-assign]
    assert misfit(flow, other) is None
    assert "encodes them otherwise" in str(misfit(flow, other, prompted=True))


def test_value_models_are_found_where_matrix_writes_them(world, models, tmp_path, stitched):
    settings = changed(strengths_tweedie=(1.0,))
    small("table1", tmp_path / "first", models, rewards=["tiny-clip"], settings=settings)
    done = len(stitched)
    name = "one--tiny-clip"
    shutil.copytree(models / name / "stitched", tmp_path / "plain" / name)
    shutil.copytree(models / name, tmp_path / "matrix" / "models" / name)
    for layout in ("plain", "matrix"):
        report = small("table1", tmp_path / f"out-{layout}", rewards=["tiny-clip"], settings=settings,
                       values=tmp_path / layout)  # fmt: skip
        assert len(report["rows"]) == 4 and not (tmp_path / f"out-{layout}" / "models").exists()
    assert len(stitched) == done
    shutil.copytree(models / name / "stitched", tmp_path / "wrong" / "one--tiny-aesthetic")
    report = small("table1", tmp_path / "out-wrong", rewards=["tiny-aesthetic"], settings=settings,
                   values=tmp_path / "wrong")  # fmt: skip
    assert [(no["row"], "reads tiny-clip" in no["error"]) for no in report["failed"]] == [("dps-stitched-2", True)]
    assert len(report["rows"]) == 3, "the other rows go on"


def test_a_value_model_is_stitched_once_and_anew_for_other_settings(world, tmp_path, stitched):
    settings = changed(strengths_tweedie=(1.0,), strengths_stitched=(2.0, 3.0))
    for _ in range(2):
        small("table1", tmp_path, rewards=["tiny-aesthetic"], settings=settings)
    assert len(stitched) == 1 and not list((tmp_path / "work").iterdir())
    rows = by_row(small("table1", tmp_path, rewards=["tiny-aesthetic"], settings=settings))
    report = small(
        "table1", tmp_path, rewards=["tiny-aesthetic"], settings=settings, scale=attrs.evolve(SCALE, steps=3)
    )
    assert len(stitched) == 2
    again = by_row(report)
    assert again["dps-stitched-2"]["run"] != rows["dps-stitched-2"]["run"]
    assert again["dps-tweedie-1"] == rows["dps-tweedie-1"], "what reads no value model stays"
    assert report["mixed"] == []
    some = small(
        "table1", tmp_path, rewards=["tiny-aesthetic"], settings=settings, rows=["dps-stitched-2"],
        scale=attrs.evolve(SCALE, steps=4),
    )  # fmt: skip
    assert some["mixed"] == [{"backbone": "one", "reward": "tiny-aesthetic", "source": "one"}]


def test_samples_that_a_value_model_is_stitched_on_are_of_the_tables_sampler(world, tmp_path):
    recipe, scale = FinetuneSettings(generated=0.5, batch_size=2), attrs.evolve(SCALE, samples=2)
    settings = changed(strengths_tweedie=(1.0,))
    small("table1", tmp_path, rewards=["tiny-clip"], settings=settings, rows=["dps-stitched-2"], recipe=recipe,
          scale=scale)  # fmt: skip
    (made,) = (tmp_path / "models").glob("*/made.json")
    drawn = json.loads(made.read_text())["settings"]["generation"]
    assert (drawn["steps"], drawn["guidance_scale"]) == (settings.steps, settings.guidance_scale)


def test_an_interrupted_run_goes_on(world, models, tmp_path, monkeypatch, aligned):
    settings = changed(strengths_tweedie=(1.0,))
    real, calls = alignment_tables.align, []

    def killed(method: str, *rest: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(method, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(alignment_tables, "align", killed)
        with pytest.raises(KeyboardInterrupt):
            small("table1", tmp_path, models, rewards=["tiny-clip"], settings=settings)
    before = json.loads((tmp_path / "table1.json").read_text())
    assert [row["row"] for row in before["rows"]] == ["plain", "kernel"] and before["partial"]
    assert len(aligned) == 2
    after = small("table1", tmp_path, models, rewards=["tiny-clip"], settings=settings)
    assert len(aligned) == 4 and after["rows"][:2] == before["rows"]


def test_a_failing_row_does_not_lose_the_others(world, models, run, tmp_path):
    options = ("--rewards", "tiny-clip", "--values", models, "--particles", 2, "--set", "window=[0.9, 0.1]")
    code, out, err = run("reproduce", "table2", "--world", "toy", "--out", tmp_path, *OPTIONS, *options)
    assert code == 1 and "best of 2" in out and "Left out: tiny-dino" in out
    message = "failed: one x tiny-clip, fk-tweedie-n2: settings of fk-steering: window is (0.9, 0.1)"
    assert message in err
    report = json.loads((tmp_path / "table2.json").read_text())
    assert [row["row"] for row in report["rows"]] == ["plain", "kernel", "best-of-2"]
    assert {row["row"] for row in report["failed"]} <= {row["row"] for row in report["missing"]}
    assert len(list((tmp_path / "cells").glob("*.error.txt"))) == 3


def test_rows_by_name_are_done_alone_beside_the_plain_one(world, models, run, tmp_path, aligned):
    options = ("--rewards", "tiny-clip", "--values", models, "--particles", 2, "--rows", "best-of-2")
    code, out, err = run("reproduce", "table2", "--world", "toy", "--out", tmp_path, *OPTIONS, *options)
    assert code == 0, err
    assert "Partial: 2 of" in out and set(aligned) == {"sample", "best-of-n"}
    found = by_row(json.loads((tmp_path / "table2.json").read_text()))
    assert found["best-of-2"]["gains"]["tiny-clip"] is not None and set(found) == {"plain", "best-of-2"}


def test_a_reward_that_compares_with_images_steers_nothing(world, tmp_path, aligned):
    report = small("table2", tmp_path, rewards=["tiny-dino"])
    assert not aligned and not report["rows"] and report["expected"] == 12
    assert (tmp_path / "table2.csv").read_text().count("\n") == 1 and not (tmp_path / "table2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table9", "--world", "toy", "--set", "prompts=1"), "unknown table 'table9'; choose one of table1, table2"),
        (("table1", "--world", "toys"), "Did you mean 'toy'"),
        (("table1", "--world", "toy", "--rewards", "clip"), "clip is not of the world 'toy'"),
        (("table1", "--world", "toy", "--strengths-tweedie", "1,-2"), "strengths are [1.0, -2.0]"),
        (("table1", "--world", "toy", "--normaliser", "rms"), "normaliser is 'rms'; choose one of raw"),
        (("table1", "--world", "toy", "--methods", "svdd"), "table1 cannot show svdd; its further methods: none"),
        (("table2", "--world", "toy", "--methods", "dps"), "its further methods: svdd, das"),
        (("table1", "--world", "toy", "--strength", "5"), "--strength means nothing here: no row of table1"),
        (("table2", "--world", "toy", "--normaliser", "norm"), "--normaliser means nothing here: no row of table2"),
        (("table6", "--world", "toy", "--strengths-stitched", "3"), "--strengths-stitched means nothing here"),
        (("fig3", "--world", "toy", "--particles", "3"), "--particles means nothing here: no row of fig3"),
        (("table2", "--world", "toy", "--rows", "plain,fk"), "table2 has no row fk; choose from plain, kernel"),
        (("table1", "--world", "toy", "--values", "nowhere"), "values is 'nowhere', which is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world, run, tmp_path, arguments, message):
    code, out, err = run("reproduce", *arguments, "--out", tmp_path / "out")
    assert code == 2 and not out
    assert err.splitlines()[-1].startswith("error: ") and message in err


def test_a_damaged_cell_is_done_again(world, models, tmp_path, aligned):
    settings = changed(strengths_tweedie=(1.0,))
    first = small("table1", tmp_path, models, rewards=["tiny-clip"], settings=settings)
    (cell,) = (tmp_path / "cells").glob("*--kernel-*.json")
    (part,) = tmp_path.glob("runs/*--kernel-*/parts/0001.safetensors")
    cell.write_text(cell.read_text()[:100])
    written = part.stat().st_mtime_ns
    again = small("table1", tmp_path, models, rewards=["tiny-clip"], settings=settings)
    assert len(aligned) == 5 and not again["failed"]
    assert part.stat().st_mtime_ns == written, "its run is not"
    kernel, before = by_row(again)["kernel"], by_row(first)["kernel"]
    assert kernel["scores"] == before["scores"] and kernel["gains"] == before["gains"]
