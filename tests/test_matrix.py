"""``stitchvm matrix`` on toy networks: every metric, what is repeated, what fails, and what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from pipelines import write_pipeline
from reward_families import aesthetic_architecture, write_aesthetic, write_dinov2
from stitchvm.core import ConfigError, StitchedValue, registry
from stitchvm.core.reproduction import matrix, world_values
from stitchvm.core.reproduction.matrix import run_matrix
from stitchvm.core.reproduction.matrix_report import COLUMNS
from stitchvm.core.reproduction.worlds import PAIRS, Scale, World

DATASET = """
import torch
from stitchvm.core import Captioned, Preferences, Rated

class Toy:
    def _images(self, split, count, seed):
        draw = torch.Generator().manual_seed(seed + (split == "test") * 100)
        return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)

    def captioned(self, split, count, seed=0):
        return Captioned(self._images(split, count, seed), self.prompts(split, count, seed))

    def prompts(self, split, count, seed=0):
        return [f"{split} {chr(97 + n % 26)}" for n in range(count)]

    def preferences(self, split, count, seed=0):
        return Preferences(self._images(split, count, seed), self._images(split, count, seed + 1),
                           self.prompts(split, count, seed))
"""
RATED = """
    def rated(self, split, count, seed=0):
        return Rated(self._images(split, count, seed), torch.arange(float(count)))
"""
NAMES = """
[backbones.tiny-sd3]
family = "mmdit"
path = "pipeline"
resolution = 16
architecture = {{ max_sequence_length = 3 }}
[rewards.tiny-clip]
family = "clip"
path = "clip"
[rewards.tiny-hps]
family = "clip"
path = "clip"
metric = "preference"
[rewards.tiny-aesthetic]
family = "aesthetic"
path = "clip"
architecture = {aesthetic}
[rewards.tiny-dino]
family = "dinov2"
path = "dino"
[datasets.toy]
load = "toy_data:Toy"
"""
SCALE = Scale(images=8, steps=2, probes=8, held_out=6)
METRICS = {"tiny-clip": "recall", "tiny-hps": "preference", "tiny-aesthetic": "rank", "tiny-dino": "similarity"}
OPTIONS = ("--images", 8, "--steps", 2, "--probes", 8, "--held-out", 6, "--sigmas", "0.25,0.9")


def toml(value: Any) -> str:
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_pipeline(folder / "pipeline")
    write_aesthetic(folder / "clip")
    write_dinov2(folder / "dino")
    (folder / "names.toml").write_text(NAMES.format(aesthetic=toml(aesthetic_architecture())))
    return folder


@pytest.fixture
def world(networks, install, fresh_registry) -> None:
    install("toy-data", {"toy_data": DATASET + RATED})
    registry().add(networks / "names.toml")


@pytest.fixture
def unrated(networks, install, fresh_registry) -> None:
    """The same world with a dataset that has no ratings."""
    install("toy-data", {"toy_data": DATASET})
    registry().add(networks / "names.toml")


@pytest.fixture
def stitches(monkeypatch) -> list[Path]:
    """Where every call of ``stitch`` writes."""
    seen: list[Path] = []
    real = world_values.stitch

    def counted(*args: Any, **settings: Any) -> StitchedValue:
        seen.append(settings["out"])
        return real(*args, **settings)

    monkeypatch.setattr(world_values, "stitch", counted)
    return seen


def small(out: Path, **options: Any) -> dict[str, Any]:
    return run_matrix("toy", out, **{"scale": SCALE, "sigmas": (0.25, 0.9), "progress": False, **options})


def test_a_world_is_what_came_with_the_dataset(world):
    place = World.of("toy")
    assert place.backbones == ("tiny-sd3",) and set(place.rewards) == set(METRICS)
    assert place.chosen(None, ["tiny-dino"]) == [("tiny-sd3", "tiny-dino")]
    with pytest.raises(ConfigError, match="hpsv2 is not of the world 'toy', which has tiny-aesthetic"):
        place.chosen(None, ["tiny-clip", "hpsv2"])


def test_every_reward_is_measured_by_its_own_metric(world, run, tmp_path):
    code, out, err = run("matrix", "--world", "toy", "--out", tmp_path, *OPTIONS, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((tmp_path / "matrix.json").read_text()) == report
    assert not report["partial"] and report["measured"] == report["pairs"] == 4
    assert {cell["reward"]: cell["metric"] for cell in report["cells"]} == METRICS
    for cell in report["cells"]:
        assert cell["sigma"] == [0.25, 0.9] and len(cell["stitched"]) == len(cell["vae"]) == 2
        if cell["clean"] > 0:
            assert cell["retention"]["vae"] == pytest.approx([value / cell["clean"] for value in cell["vae"]])
        models = tmp_path / "models" / f"tiny-sd3--{cell['reward']}"
        for name, cut in (("stitched", cell["interface"]["i"]), ("vae", -1)):
            assert StitchedValue.from_pretrained(models / name).interface().i == cut
    assert (tmp_path / "matrix.png").stat().st_size > 10_000
    assert not list((tmp_path / "work").iterdir()), "caches of finished cells are let go"


def test_the_table_says_what_the_json_says(world, tmp_path):
    report = small(tmp_path, rewards=["tiny-clip", "tiny-dino"])
    with (tmp_path / "matrix.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS and len(table) == 2 * 2 * 2
    for row in table:
        cell = next(cell for cell in report["cells"] if cell["reward"] == row["reward"])
        k = cell["sigma"].index(float(row["sigma"]))
        assert float(row["value"]) == cell[row["model"]][k]
        share = cell["retention"][row["model"]][k]
        assert row["retention"] == ("" if share is None else str(share))
        assert row["chance"] == ("" if cell["chance"] is None else str(cell["chance"]))
        assert int(row["i"]) == (cell["interface"]["i"] if row["model"] == "stitched" else -1)


@pytest.mark.parametrize("reward", ["tiny-hps", "tiny-dino"])
def test_evaluate_measures_a_cell_s_model_alike(world, run, tmp_path, reward):
    cell = small(tmp_path, rewards=[reward])["cells"][0]
    models = tmp_path / "models" / f"tiny-sd3--{reward}"
    count = 6 * (PAIRS if METRICS[reward] == "preference" else 1)
    code, out, err = run(
        "evaluate", models / "stitched", "--vae", models / "vae", "--data", "toy", "--count", count, "--sigmas",
        "0.25,0.9", "--out", tmp_path / "report", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"skill"} and found["skill"]["metric"] == METRICS[reward]
    for key in ("clean", "stitched", "vae", "chance", "count"):
        assert found["skill"][key] == (pytest.approx(cell[key]) if cell[key] is not None else None), key
    assert (tmp_path / "report" / "skill.png").is_file()
    code, out, _ = run("evaluate", models / "stitched", "--data", "toy", "--count", 6)
    assert code == 0 and "retention" in out


def test_evaluate_of_a_reward_that_reads_prompts_keeps_retrieval(world, run, tmp_path):
    small(tmp_path, rewards=["tiny-clip"])
    place = tmp_path / "models" / "tiny-sd3--tiny-clip" / "stitched"
    code, out, err = run("evaluate", place, "--data", "toy", "--count", 6, "--json")
    assert code == 0, err
    found = json.loads(out)
    for key in ("sigma", "clean", "stitched", "count"):
        assert found["retrieval"][key] == found["skill"][key]
    assert found["retrieval"]["retention"] == found["skill"]["retention"]["stitched"]


def test_a_finished_cell_is_not_repeated_with_the_same_settings(world, tmp_path, stitches):
    first = small(tmp_path, rewards=["tiny-dino"])
    assert [path.name for path in stitches] == ["stitched", "vae"]
    assert small(tmp_path, rewards=["tiny-dino"])["cells"] == first["cells"] and len(stitches) == 2
    changed = small(tmp_path, rewards=["tiny-dino"], seed=1)
    assert len(stitches) == 4 and changed["cells"][0]["seed"] == 1


def test_a_retrained_reward_is_stitched_again(world, networks, tmp_path, stitches):
    from safetensors.torch import load_file, save_file

    small(tmp_path, rewards=["tiny-dino"])
    weights = networks / "dino" / "model.safetensors"
    before = weights.read_bytes()
    try:
        save_file({name: tensor + 0.1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        small(tmp_path, rewards=["tiny-dino"])
    finally:
        weights.write_bytes(before)
    assert len(stitches) == 4


@pytest.mark.parametrize("killed_in", ["stitch", "measure"])
def test_an_interrupted_cell_goes_on(killed_in, world, tmp_path, monkeypatch):
    """Killed before the baseline it begins with that, its examples as they were; killed later, with the metric."""
    from stitchvm.core.skills import SkillData

    real, made = world_values.stitch, []

    def killed(*arguments: Any, **settings: Any) -> Any:
        if killed_in == "measure" or made:
            raise KeyboardInterrupt
        made.append(1)
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(*((world_values, "stitch") if killed_in == "stitch" else (SkillData, "measure")), killed)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, rewards=["tiny-dino"])
    assert not list((tmp_path / "cells").glob("*.json"))
    caches = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert any("finetune" in str(path) for path in caches)
    again: list[float] = []
    monkeypatch.setattr(world_values, "stitch", lambda *a, **k: (again.append(1), real(*a, **k))[1])
    monkeypatch.setattr(matrix.shutil, "rmtree", lambda path, ignore_errors: None)
    report = small(tmp_path, rewards=["tiny-dino"])
    assert report["measured"] == 1 and len(again) == (2 if killed_in == "stitch" else 0)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert {path: after[path] for path in caches} == caches, "neither examples nor finetune are done again"


def test_where_the_metric_alone_changes_the_models_stay(world, tmp_path, stitches):
    first = small(tmp_path, rewards=["tiny-hps"])["cells"][0]
    assert first["count"] == 6 * PAIRS and len(stitches) == 2
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")}
    other = small(tmp_path, rewards=["tiny-hps"], scale=attrs.evolve(SCALE, held_out=4))["cells"][0]
    assert other["count"] == 4 * PAIRS and len(stitches) == 2
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert other["interface"] == first["interface"] and other["cost"]["stitched"] == first["cost"]["stitched"]
    small(tmp_path, rewards=["tiny-hps"], scale=attrs.evolve(SCALE, steps=3))
    assert len(stitches) == 4


def test_a_partial_matrix_says_so_and_grows(world, run, tmp_path):
    code, out, _ = run("matrix", "--world", "toy", "--out", tmp_path, *OPTIONS, "--rewards", "tiny-clip")
    assert code == 0 and "Partial: 1 of 4 pairs" in out and "tiny-clip" in out
    report = json.loads((tmp_path / "matrix.json").read_text())
    assert report["partial"] and {entry["reward"] for entry in report["missing"]} == set(METRICS) - {"tiny-clip"}
    report = small(tmp_path, rewards=["tiny-dino"])
    assert [cell["reward"] for cell in report["cells"]] == ["tiny-clip", "tiny-dino"], "both runs share the folder"
    report = small(tmp_path, rewards=["tiny-dino"], seed=2)
    assert [cell["reward"] for cell in report["cells"]] == ["tiny-dino"], "cells of other settings are not mixed in"


def test_a_failing_cell_does_not_lose_the_others(unrated, run, tmp_path, stitches):
    rewards = "tiny-aesthetic,tiny-dino"
    code, out, err = run("matrix", "--world", "toy", "--out", tmp_path, *OPTIONS, "--rewards", rewards)
    assert code == 1 and "tiny-dino" in out
    assert "failed: tiny-sd3 x tiny-aesthetic: the metric 'rank' needs a dataset that offers rated" in err
    report = json.loads((tmp_path / "matrix.json").read_text())
    assert [cell["reward"] for cell in report["cells"]] == ["tiny-dino"]
    assert [entry["reward"] for entry in report["failed"]] == ["tiny-aesthetic"]
    assert "tiny-aesthetic" in {entry["reward"] for entry in report["missing"]}
    assert len(stitches) == 2, "what cannot be measured is not trained"
    note = tmp_path / "cells" / "tiny-sd3--tiny-aesthetic.error.txt"
    assert "ConfigError" in note.read_text()


def test_an_unforeseen_failure_is_named_and_forgotten_when_it_is_mended(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "search", lambda *a, **k: torch.zeros(2) @ torch.zeros(3))
        report = small(tmp_path, rewards=["tiny-dino"])
    assert report["failed"][0]["error"].startswith("RuntimeError: ") and not report["cells"]
    assert not (tmp_path / "matrix.png").exists() and (tmp_path / "matrix.csv").read_text().count("\n") == 1
    assert small(tmp_path, rewards=["tiny-dino"])["failed"] == []
    assert not list((tmp_path / "cells").glob("*.txt"))


def test_a_damaged_cell_is_named_and_loses_nothing(world, tmp_path, stitches):
    small(tmp_path, rewards=["tiny-dino", "tiny-clip"])
    damaged = tmp_path / "cells" / "tiny-sd3--tiny-clip.json"
    damaged.write_text(damaged.read_text()[:200])
    report = small(tmp_path, rewards=["tiny-dino", "tiny-clip"])
    assert "tiny-sd3--tiny-clip.json' is not valid JSON" in report["failed"][0]["error"]
    assert [cell["reward"] for cell in report["cells"]] == ["tiny-dino"] and len(stitches) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world", "toys"), "Did you mean 'toy'"),
        (("--world", "toy", "--rewards", "clip"), "clip is not of the world 'toy'"),
        (("--world", "toy", "--backbones", "tiny-sd3,"), "--backbones is 'tiny-sd3,'"),
        (("--world", "toy", "--recipe", "quik"), "unknown recipe 'quik'"),
        (("--world", "toy", "--sigmas", "3"), "noise levels lie from 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world, run, tmp_path, arguments, message):
    code, out, err = run("matrix", *arguments, "--out", tmp_path / "out")
    assert code == 2 and not out
    assert err.splitlines()[-1].startswith("error: ") and message in err
