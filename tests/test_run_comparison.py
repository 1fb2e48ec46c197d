"""Folders that ``align`` wrote, compared by hand-made rewards and pictures."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image
from typer.testing import CliRunner

from stitchvm.core import ArtefactError, ConfigError
from stitchvm.core.cli import app
from stitchvm.core.run_comparison import compare_repetitions, compare_runs


def write_run(folder, rewards, *, prompts=("a", "b", "c"), seed=0, reward="clip", levels=(0, 0, 0), **further):
    folder.mkdir()
    samples = []
    for number, (prompt, value, level) in enumerate(zip(prompts, rewards, levels, strict=True)):
        Image.new("RGB", (4, 4), (level, 0, 0)).save(folder / f"{number}.png")
        samples.append({"prompt": prompt, "file": f"{number}.png", "reward": value})
    settings = {"method": folder.name, "particles": 4, "reward": {"name": reward}, "seed": seed, **further}
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
    whole = json.loads((run / "align.json").read_text())
    del whole["settings"]["method"]
    for damaged in ({}, whole):
        (run / "align.json").write_text(json.dumps(damaged))
        with pytest.raises(ArtefactError, match="not what align writes"):
            compare_runs([run])
    with pytest.raises(ArtefactError, match="does not exist"):
        compare_runs([tmp_path])
    with pytest.raises(ConfigError, match="no folder"):
        compare_runs([])


ABC, ABD = ("a", "b", "c"), ("a", "b", "d")


def repeated(folder, gains, **kwargs):
    """A pair of runs of methods ``plain`` and ``fk``."""
    folder.mkdir()
    return [write_run(folder / "plain", [0.0] * 3, **kwargs), write_run(folder / "fk", gains, **kwargs)]


def test_repetitions_are_pooled(tmp_path):
    runs = repeated(tmp_path / "0", [1.0, 2.0, 3.0]) + repeated(tmp_path / "1", [3.0, 4.0, 8.0], seed=1)
    found = json.loads(json.dumps(compare_repetitions(runs, 2, lambda images, prompts: images[:, 0, 0, 0] > 0.5)))
    assert [group["seed"] for group in found["repetitions"]] == [0, 1]
    assert found["repetitions"][1] == compare_runs(runs[2:], lambda images, prompts: images[:, 0, 0, 0] > 0.5)
    (pooled,) = found["pooled"]
    # Three prompts, of which each has two of the six differences around 3.5: 1 + 3, 2 + 4 and 3 + 8 less 7.
    assert pooled["gain"] == {"mean": 3.5, "stderr": pytest.approx(math.sqrt((9 + 1 + 16) * 3 / 2) / 6)}
    assert (pooled["pairs"], pooled["prompts"], pooled["method"]) == (6, 3, "fk")
    assert pooled["detector_gain"] == {"mean": 0, "stderr": 0}


def test_repetitions_may_have_other_prompts(tmp_path):
    runs = repeated(tmp_path / "0", [1.0, 2.0, 3.0]) + repeated(tmp_path / "1", [3.0, 4.0, 8.0], prompts=ABD)
    (pooled,) = compare_repetitions(runs, 2)["pooled"]
    assert pooled["prompts"] == 4 and "detector_gain" not in pooled
    assert pooled["gain"]["stderr"] == pytest.approx(math.sqrt((9 + 1 + 0.25 + 20.25) * 4 / 3) / 6)


def test_an_estimator_that_draws_has_a_seed_too(tmp_path):
    def rollouts(seed, count=4):
        parts = [{"name": "MonteCarlo", "rollouts": count, "seed": seed}]
        return {"seed": seed, "estimator": {"name": "Sum", "of": parts}}

    runs = repeated(tmp_path / "0", [1.0, 2.0, 3.0], **rollouts(0))
    again = repeated(tmp_path / "1", [1.0, 2.0, 3.0], **rollouts(1))
    assert compare_repetitions([*runs, *again], 2)["pooled"][0]["pairs"] == 6
    with pytest.raises(ConfigError, match="differ in their estimator"):
        compare_repetitions([*runs, *repeated(tmp_path / "2", [1.0, 2.0, 3.0], **rollouts(2, 16))], 2)


def test_repetitions_on_the_command_line(tmp_path):
    runs = repeated(tmp_path / "0", [1.0, 2.0, 3.0]) + repeated(tmp_path / "1", [3.0, 4.0, 8.0], seed=1)
    result = CliRunner().invoke(app, ["evaluate", *map(str, runs), "--repetitions", "2"])
    assert result.exit_code == 0, result.output
    assert result.output.count("gains are paired with the first run") == 2
    assert "3.5 ± 1" in result.output and "clustered by prompt" in result.output


def test_what_is_no_repetition_is_refused(tmp_path):
    first = repeated(tmp_path / "0", [1.0, 2.0, 3.0])

    def detector(*_):
        pytest.fail("pictures are looked at before the runs are known to be repetitions")

    with pytest.raises(ConfigError, match="differ in their method"):
        compare_repetitions([*first, *reversed(repeated(tmp_path / "1", [1.0, 2.0, 3.0], seed=1))], 2, detector)
    with pytest.raises(ConfigError, match="same prompts and seed"):
        compare_repetitions([*first, *repeated(tmp_path / "2", [1.0, 2.0, 3.0])], 2)
    for runs, repetitions in ((first, 2), (first * 2, 3), (first, 1), (first * 2, 0)):
        with pytest.raises(ConfigError, match=f"{len(runs)} folders are no {repetitions} repetitions"):
            compare_repetitions(runs, repetitions)
