"""Means, errors and paired gains against formulas by hand; comparison of folders that ``align`` wrote."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from stitchvm.core import ArtefactError, ConfigError, DataError
from stitchvm.core.comparison import MeanStderr, compare_runs, mean_stderr, paired_gain
from stitchvm.core.prompts import open_prompts


def test_mean_and_standard_error_by_hand():
    found = mean_stderr([1.0, 2.0, 6.0])
    assert found.mean == pytest.approx(3)
    assert found.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert found.report() == {"mean": found.mean, "stderr": found.stderr}


def test_a_share_of_booleans():
    found = mean_stderr(torch.tensor([True, True, False, True]))
    assert found.mean == 0.75
    assert found.stderr == pytest.approx(0.25)


def test_a_single_value_has_no_error():
    assert mean_stderr([2.0]) == MeanStderr(2.0, None)
    assert str(MeanStderr(2.0, None)) == "2"
    assert str(MeanStderr(0.12345, 0.0123)) == "0.1235 ± 0.012"


def test_what_prompts_share_cancels_in_a_paired_gain():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator) * 100
    gain = paired_gain(base + 1 + torch.randn(500, generator=generator) * 0.1, base)
    assert gain.mean == pytest.approx(1, abs=4 * 0.1 / math.sqrt(500))
    assert gain.stderr == pytest.approx(0.1 / math.sqrt(500), rel=0.15)
    assert paired_gain([1.0, 2.0], [3.0, 5.0]).mean == -2.5


def test_the_standard_error_covers_the_truth():
    """Two standard errors cover the true mean 95.4 % of the time (of 500 draws, so within 3.7 % at 4 sigma)."""
    draws = torch.randn(500, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covered = sum(abs(found.mean) < 2 * found.stderr for found in map(mean_stderr, draws.tolist()))
    assert covered / 500 == pytest.approx(0.954, abs=0.037)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_nothing_to_average(values):
    with pytest.raises(DataError):
        mean_stderr(values)


def test_unequal_numbers_are_no_pairs():
    with pytest.raises(DataError, match="cannot pair 2 values with 3"):
        paired_gain([1, 2], [1, 2, 3])


def write_run(folder, rewards, *, prompts=("a", "b", "c"), seed=0, reward="clip", levels=(0, 0, 0)):
    folder.mkdir()
    samples = []
    for number, (prompt, value, level) in enumerate(zip(prompts, rewards, levels, strict=True)):
        Image.new("RGB", (4, 4), (level, 0, 0)).save(folder / f"{number}.png")
        samples.append({"prompt": prompt, "file": f"{number}.png", "reward": value})
    settings = {"method": folder.name, "particles": 4, "reward": {"name": reward}}
    content = {"settings": settings, "samples": samples, "seed": seed, "cost": {"denoiser": 84, "seconds": 1.5}}
    (folder / "align.json").write_text(json.dumps(content))
    return folder


def red(images, prompts):
    assert prompts == ["a", "b", "c"]
    return images[:, 0].mean((1, 2)) > 0.5


def test_runs_are_compared_with_the_first(tmp_path):
    base = write_run(tmp_path / "plain", [1.0, 2.0, 3.0], levels=(0, 0, 255))
    other = write_run(tmp_path / "fk", [2.0, 4.0, 6.0], levels=(255, 0, 255))
    report = json.loads(json.dumps(compare_runs([base, other], red)))
    assert report["prompts"] == 3
    first, second = report["runs"]
    assert "gain" not in first and first["method"] == "plain"
    assert second["reward"]["mean"] == 4
    assert second["gain"] == {"mean": 2, "stderr": pytest.approx(1 / math.sqrt(3))}
    assert first["detector"]["mean"] == pytest.approx(1 / 3)
    assert second["detector_gain"]["mean"] == pytest.approx(1 / 3)
    assert second["cost"]["denoiser"] == 84
    assert compare_runs([base])["runs"][0]["detector"] is None


@pytest.mark.parametrize(
    ("change", "what"),
    [({"prompts": ("a", "b", "x")}, "prompts"), ({"seed": 1}, "seed"), ({"reward": "other"}, "reward")],
)
def test_runs_that_are_no_pairs_are_refused(tmp_path, change, what):
    base = write_run(tmp_path / "plain", [1, 2, 3])
    with pytest.raises(ConfigError, match=f"differ in their {what}"):
        compare_runs([base, write_run(tmp_path / "fk", [1, 2, 3], **change)])


def test_damaged_runs_are_named(tmp_path):
    run = write_run(tmp_path / "plain", [1, 2, 3])
    (run / "1.png").write_text("words")
    with pytest.raises(ArtefactError, match=r"1\.png"):
        compare_runs([run], red)
    (run / "align.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not what align writes"):
        compare_runs([run])
    with pytest.raises(ArtefactError, match="does not exist"):
        compare_runs([tmp_path])
    with pytest.raises(ConfigError, match="no folder"):
        compare_runs([])


def test_prompts_from_a_file(tmp_path, fresh_registry):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blué star \nthird\n", encoding="utf-8")
    assert open_prompts(file) == ["a red circle", "a blué star", "third"]
    assert open_prompts(str(file), 2) == ["a red circle", "a blué star"]
    file.write_text(" \n")
    with pytest.raises(DataError, match="holds no prompt"):
        open_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="text file"):
        open_prompts(file)
    with pytest.raises(DataError, match="neither a file of prompts nor a dataset"):
        open_prompts(str(tmp_path / "none.txt"))
