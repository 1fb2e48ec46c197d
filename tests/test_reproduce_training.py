"""``stitchvm reproduce table3`` and its relatives on toy networks: which trainings, what is compared, what is kept."""

from __future__ import annotations

import csv
import json

import attrs
import pytest

from stitchvm.core import ArtefactError, ConfigError
from stitchvm.core.files import read_tensors, write_tensors
from stitchvm.core.reproduction.training_rows import TRAINING_TABLES, TrainingScale
from stitchvm.core.reproduction.training_tables import _gain, _time_to_match, reproduce_training
from stitchvm.core.reproduction.worlds import Scale
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from test_reproduce import networks, world  # noqa: F401  (fixtures)

TINY = TrainingScale(updates=2, prompts=2, samples=2, steps=4, evaluate_every=1, evaluation_prompts=2, seeds=(0, 1))
STITCHING = Scale(images=8, steps=2, probes=8)


def test_every_training_of_a_table_is_done_once_and_compared(world, tmp_path):  # noqa: F811
    rows = ["draft-1", "draft-1-stopped"]
    report = reproduce_training("table3", "toy", tmp_path, rows=rows, scale=TINY, stitching=STITCHING, progress=False)
    assert report["failed"] == {} and [row["row"] for row in report["rows"]] == rows
    plain, stopped = report["rows"]
    assert list(plain["after"]) == ["tiny-clip", "tiny-aesthetic", "detector"]  # trained, held out, the dataset's word
    assert plain["cost"]["decoder"] > 0 and "decoder" not in stopped["cost"] and stopped["cost"]["head"] > 0
    assert plain["time_to_match"] is None and len(stopped["time_to_match"]) == 2
    assert plain["gain"] is None
    difference = stopped["after"]["tiny-aesthetic"]["mean"] - plain["after"]["tiny-aesthetic"]["mean"]
    assert stopped["gain"]["tiny-aesthetic"]["mean"] == pytest.approx(difference)
    lines = list(csv.DictReader((tmp_path / "table3.csv").read_text(encoding="utf-8").splitlines()))
    assert [int(line["update"]) for line in lines] == 2 * 2 * [0, 1, 2]  # rows and seeds, each with its evaluations
    assert (tmp_path / "table3.png").exists()
    assert len(report["missing"]) == 2 * (len(TRAINING_TABLES["table3"][1](TINY)) - 2)
    records = sorted((tmp_path / "trainings").glob("*/train.json"))
    before = [path.stat().st_mtime_ns for path in records]
    again = reproduce_training("fig4", "toy", tmp_path, rows=rows, scale=TINY, stitching=STITCHING, progress=False)
    assert [path.stat().st_mtime_ns for path in records] == before  # fig4 draws the same trainings
    assert again["rows"] == report["rows"]
    begun = reproduce_training(  # what went on for longer is shown as it was then
        "table3", "toy", tmp_path, rows=rows, scale=attrs.evolve(TINY, updates=1), stitching=STITCHING, progress=False
    )
    assert [path.stat().st_mtime_ns for path in records] == before
    assert begun["rows"][0]["curves"] == [
        {name: figures[:2] for name, figures in curve.items()} for curve in report["rows"][0]["curves"]
    ]
    assert begun["rows"][0]["cost"]["denoiser"] < report["rows"][0]["cost"]["denoiser"]
    reproduce_training(  # by another value, stopped trainings are others
        "table3", "toy", tmp_path, rows=rows, scale=attrs.evolve(TINY, seeds=(0,)),
        stitching=attrs.evolve(STITCHING, steps=3), progress=False,
    )  # fmt: skip
    assert len(list((tmp_path / "trainings").glob("*/train.json"))) == len(records) + 1


def test_value_models_of_each_reward_serve_a_training_for_all(world, tmp_path):  # noqa: F811
    settings = {"rows": ["draft-1-stopped"], "scale": attrs.evolve(TINY, seeds=(0,)), "stitching": STITCHING,
                "progress": False}  # fmt: skip
    reproduce_training("table3", "toy", tmp_path / "apart", rewards=["tiny-clip"], **settings)
    both = {"rewards": ["tiny-clip", "tiny-aesthetic"], "value": tmp_path / "apart", **settings}
    with pytest.raises(ConfigError, match="nor one--tiny-aesthetic. Give the folder"):
        reproduce_training("table3", "toy", tmp_path / "out", **both)
    reproduce_training("table3", "toy", tmp_path / "apart", rewards=["tiny-aesthetic"], **settings)
    report = reproduce_training("table3", "toy", tmp_path / "out", **both)
    assert report["failed"] == {} and report["rows"][0]["cost"]["tail"] == 2 * report["rows"][0]["cost"]["head"]
    assert list(report["rows"][0]["after"]) == ["tiny-clip + tiny-aesthetic", "detector"]


def test_a_training_by_a_given_value_is_known_by_its_weights_and_not_by_how_it_was_made(world, tmp_path):  # noqa: F811
    settings = {"rows": ["draft-1-stopped"], "scale": attrs.evolve(TINY, seeds=(0,)), "progress": False}
    reproduce_training("table3", "toy", tmp_path / "made", stitching=STITCHING, **settings)
    (config,) = (tmp_path / "made/models").glob("**/config.json")
    weights, trainings = config.parent / "model.safetensors", tmp_path / "out/trainings"
    for change, expected in (
        (lambda: None, 1),
        (lambda: config.write_text(json.dumps({**json.loads(config.read_text()), "cost": {"seconds": 1.0}})), 1),
        (lambda: write_tensors(weights, {n: t.clone() + 1 for n, t in read_tensors(weights).items()}), 2),
    ):
        change()
        reproduce_training("table3", "toy", tmp_path / "out", value=config.parent, **settings)
        assert len(list(trainings.glob("*/train.json"))) == expected
    weights.unlink()
    with pytest.raises(ArtefactError, match="model.safetensors' cannot be read .No such file"):
        reproduce_training("table3", "toy", tmp_path / "out", value=config.parent, **settings)


def test_a_training_is_told_apart_by_the_settings_that_it_reads_alone(world, tmp_path):  # noqa: F811
    for levels, expected in ((2, {"draft-1": 1, "nft": 1}), (3, {"draft-1": 1, "nft": 2})):
        scale = attrs.evolve(TINY, seeds=(0,), levels=levels)
        reproduce_training("table3", "toy", tmp_path, rows=["draft-1", "nft"], scale=scale, progress=False)
        done = [folder.parent.name.split("--")[1] for folder in tmp_path.glob("trainings/*/train.json")]
        assert {name: done.count(name) for name in set(done)} == expected


def test_samples_that_its_value_is_stitched_on_are_of_the_sampler_in_training(world, tmp_path):  # noqa: F811
    recipe = FinetuneSettings(generated=0.5, batch_size=2)
    reproduce_training(
        "table3", "toy", tmp_path, rows=["draft-1-stopped"], scale=attrs.evolve(TINY, seeds=(0,)), recipe=recipe,
        stitching=attrs.evolve(STITCHING, samples=2), progress=False,
    )  # fmt: skip
    (made,) = (tmp_path / "models").glob("*/made.json")
    drawn = json.loads(made.read_text())["settings"]["generation"]
    assert (drawn["steps"], drawn["guidance_scale"]) == (TINY.steps, 1.0)


def test_the_command_says_what_became_of_the_rewards(world, run, tmp_path):  # noqa: F811
    settings = ("updates=1", "prompts=2", "samples=2", "steps=4", "evaluation_prompts=2", "seeds=[0]")
    sets = [argument for pair in settings for argument in ("--set", pair)]
    code, out, errors = run("reproduce", "fig7", "--world", "toy", "--out", tmp_path, "--rows", "nft", *sets)
    assert code == 0, errors
    assert "DiffusionNFT" in out and "Partial. Written to" in out
    assert json.loads((tmp_path / "fig7.json").read_text())["rows"][0]["seeds"] == [0]


def test_options_that_a_training_would_ignore_are_refused(world, run, tmp_path):  # noqa: F811
    asked = ("--prompts", 200, "--steps", 5, "--methods", "nft")
    code, _, errors = run("reproduce", "table3", "--world", "toy", "--out", tmp_path, *asked)
    assert code == 2 and "--prompts, --steps, --methods means nothing here: table3 trains" in errors
    common = ("--prompts", tmp_path / "p.txt", "--out", tmp_path / "o", "--reward", "tiny-clip")
    code, _, errors = run("align", "draft", "one", *common, "--batch", 64, "--no-reuse")
    assert code == 2 and "--batch, --reuse means nothing here: draft trains" in errors
    code, _, errors = run("align", "best-of-n", "one", *common, "--train", "updates=3")
    assert code == 2 and "--train means nothing here: best-of-n samples" in errors


def test_time_to_match_is_when_the_plain_ones_last_reward_was_reached():
    curves = [{"seconds": [0, 50, 100], "r": [0.1, 0.2, last]} for last in (0.3, 0.9)]
    plain = {"trained": "r", "seeds": [0, 2], "curves": curves}
    curves = [{"seconds": [0, 20, 40], "r": means} for means in ([0.1, 0.3, 0.4], [0.1, 2.0, 2.0], [0.1, 0.2, 0.2])]
    assert _time_to_match({"seeds": [0, 1, 2], "curves": curves}, plain) == [0.2, None, None]  # seed 1 has no plain one
    assert _time_to_match({"seeds": [2, 0], "curves": curves[1:]}, plain) == [0.2, None]


def test_a_stopped_training_is_paired_with_its_plain_one_by_prompt_and_seed():
    """Three prompts: their differences, mean over both seeds, are 0.1, 0.3 and 0.2 from the plain one's last samples
    and 0.2 more from those after 50 seconds, which the stopped one did not take; a third seed has no pair."""
    plain = {0: [1.0, 2.0, 3.0], 1: [2.0, 1.0, 5.0]}
    stopped = {0: [1.2, 2.2, 3.0], 1: [2.0, 1.4, 5.4], 2: [9.0, 9.0, 9.0]}
    ours = {seed: {"evaluations": [evaluated(0, [0.0] * 3), evaluated(40, scores)]} for seed, scores in stopped.items()}
    theirs = {seed: {"evaluations": [evaluated(0, [0.0] * 3), evaluated(50, [score - 0.2 for score in scores]),
                                     evaluated(100, scores)]} for seed, scores in plain.items()}  # fmt: skip
    found = _gain(ours, theirs)["r"]
    assert found["mean"] == pytest.approx(0.2) and found["stderr"] == pytest.approx(0.1 / 3**0.5)
    assert _gain(ours, theirs, in_its_time=True)["r"]["mean"] == pytest.approx(0.4)
    for run in ours.values():  # one that takes longer than the plain one has its end beside it
        run["evaluations"][-1]["seconds"] = 200
    assert _gain(ours, theirs, in_its_time=True) == {"r": found}


def evaluated(seconds, scores):
    return {"seconds": seconds, "scores": {"r": scores}}


def test_windows_are_steps_and_never_the_last():
    rows = {row.name: row for row in TRAINING_TABLES["fig7"][1](TrainingScale(steps=25))}
    assert rows["nft-12-17"].method_settings(25)["stop"] == (12, 17)
    assert rows["nft-12-25"].method_settings(25)["stop"] == (12, 24)
    assert rows["nft-2-12"].method_settings(10)["stop"] == (1, 5)
    assert "stop" not in rows["nft"].method_settings(25)
    own = TRAINING_TABLES["fig7"][1](TrainingScale(windows=((7, 12), (10, 10))))
    assert [row.method_settings(10).get("stop") for row in own] == [None, (3, 5), (4, 4)]
    draft = {row.name: row for row in TRAINING_TABLES["fig7-draft"][1](TrainingScale(windows=((2, 8),)))}
    assert draft["draft-1-2-8"].method_settings(10) == {"backward_steps": 1, "samples_per_prompt": 8, "stop": (1, 3)}
    assert draft["draft-1-2-8"].beside == "draft-1" and draft["draft-1"].stop is None
    with pytest.raises(ConfigError, match=r"windows has \[12, 7\]; give the first and last of 1 to 25"):
        TrainingScale(windows=((12, 7),))


@pytest.mark.parametrize(("table", "options", "said"), [
    ("table9", {}, "unknown table 'table9'"), ("table3", {"rows": ["nothing"]}, "table3 has no row nothing"),
    ("table3", {"rewards": ["tiny-cat"]}, "tiny-cat is not of the world"),
])  # fmt: skip
def test_what_it_refuses(table, options, said, world, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=said):
        reproduce_training(table, "toy", tmp_path, scale=TINY, progress=False, **options)
    with pytest.raises(ConfigError, match="samples is 1"):
        TrainingScale(samples=1)
