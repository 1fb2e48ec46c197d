"""``stitchvm search | stitch | evaluate`` on a toy pair from a registry file, and what they say about mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch

from families import write_clip
from pipelines import write_pipeline
from results import summary
from stitchvm.core import ConfigError, Policy, StitchedValue, load_backbone, registry
from stitchvm.core.cli.options import levels, numbers
from stitchvm.core.cli.stitch import read_recipe
from stitchvm.core.stitching.recipes import recipe
from test_policy import moved
from training_worlds import LORA

DATASET = """
import torch
from stitchvm.core.datasets import Captioned

class Noise:
    def captioned(self, split, count, seed=0):
        draw = torch.Generator().manual_seed(seed + (split == "test") * 100)
        images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)
        return Captioned(images, self.prompts(split, count, seed))

    def prompts(self, split, count, seed=0):
        return [f"{split} {chr(97 + n % 26)} {chr(97 + n // 26)}" for n in range(count)]

    def fulfilled(self, images, prompts):
        return images.mean((1, 2, 3)) > 0.5
"""
PLACES = """
[backbones.tiny-sd3]
family = "mmdit"
path = "pipeline"
resolution = 16
architecture = { max_sequence_length = 3 }
[rewards.tiny-clip]
family = "clip"
path = "clip"
[rewards.tiny-other]
family = "clip"
path = "clip"
[datasets.noise]
load = "noise_data:Noise"
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_pipeline(folder / "pipeline")
    write_clip(folder / "clip")
    (folder / "names.toml").write_text(PLACES)
    return folder


@pytest.fixture
def run(run, networks, install):
    """``run("search", ...) -> (exit code, output, last line of errors)``."""
    install("noise-data", {"noise_data": DATASET})
    registry().add(networks / "names.toml")

    def call(*arguments: object) -> tuple[int, str, str]:
        code, out, errors = run(*arguments)
        return code, out, (errors.splitlines() or [""])[-1]

    return call


PAIR = ("tiny-sd3", "tiny-clip", "--images", "noise")
SAMPLE = ("align", "sample", "tiny-sd3", "--prompts", "noise", "--count", "2", "--out", "OUT")
SHORT = ("--steps", "2", "--batch-size", "4", "--probes", "8", "--blocks", "1-2", "--cuts", "1,3")


def test_search_writes_and_prints_the_grid(run, tmp_path):
    code, out, err = run("search", *PAIR, "--probes", 8, "--blocks", "1-2", "--out", tmp_path, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert len(report["grid"]) == 8 and report["probes"] == 8
    assert json.loads((tmp_path / "search.json").read_text()) == report
    assert (tmp_path / "interface.png").stat().st_size > 1000
    code, out, _ = run("search", *PAIR, "--probes", 8, "--cuts", "2-3", "--blocks", "1", "--criterion", "mse")
    assert code == 0
    assert "cut i" in out and "Best for tiny-clip on 8 images: after backbone block" in out


def test_several_rewards_share_a_head(run, tmp_path):
    pair, value = ("tiny-sd3", "tiny-clip,tiny-other", "--images", "noise"), tmp_path / "value"
    bounds = ("--probes", 8, "--blocks", "1-2", "--cuts", "1,3", "--taps", "0")
    code, out, err = run("search", *pair, *bounds, "--out", tmp_path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["reward"] for each in found["rewards"]] == ["tiny-clip", "tiny-other"]
    assert {path.name for path in tmp_path.glob("interface*.png")} == {
        "interface-tiny-clip.png", "interface-tiny-other.png",
    }  # fmt: skip
    code, out, err = run(
        "stitch", *pair, "--out", value, *SHORT, "--count", 8, "--weights", "1,0.5", "--taps", "0", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["taps"] == [0]
    assert report["weights"] == {"tiny-clip": 1.0, "tiny-other": 0.5}
    assert report["interface"] == found["best"]
    assert StitchedValue.from_pretrained(value).weights == (1.0, 0.5)
    steer = ("align", "fk-steering", "tiny-sd3", "--value", value, "--prompts", "noise", "--count", 1, "--steps", 3,
             "--particles", 2, "--negative-prompt", "grey", "--out", tmp_path / "run", "--json")  # fmt: skip
    code, out, err = run(*steer)
    assert code == 0, err
    settings = json.loads(out)["settings"]
    assert (settings["reward"]["name"], settings["negative_prompt"]) == ("tiny-clip + 0.5 tiny-other", "grey")
    code, _, err = run("evaluate", value, "--data", "noise", "--count", 8)
    assert code == 2
    assert "reads tiny-clip, tiny-other; say which" in err
    code, out, err = run("evaluate", value, "--data", "noise", "--count", 8, "--reward", "tiny-other", "--json")
    assert code == 0, err
    assert json.loads(out)["retrieval"]["count"] == 8


def test_stitch_evaluate_align_and_compare(run, tmp_path):
    value = tmp_path / "value"
    code, out, err = run(
        "stitch", *PAIR, "--out", value, *SHORT, "--count", 8, "--generated", 0.5, "--samples", 4, "--prompts", "noise",
        "--learning-rate", 1e-4, "--seed", 5, "--sampling-steps", 3, "--guidance-scale", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    (drawn,) = (value / "work").glob("samples-*/settings.json")
    drawing = json.loads(drawn.read_text())["generation"]
    assert (drawing["steps"], drawing["guidance_scale"], drawing["seed"]) == (3, 1.0, 5)
    told = json.loads((value / "config.json").read_text())["examples"]
    assert (told["images"], told["samples"], told["drawn by"]) == (8, 4, drawing)
    assert "- samples: 4" in (value / "README.md").read_text()
    report = json.loads(out)
    assert report["recipe"]["steps"] == 2 and report["recipe"]["seed"] == 5 and report["interface"]["i"] in (1, 3)
    assert StitchedValue.from_pretrained(value).interface().i == report["interface"]["i"]

    baseline = tmp_path / "vae"
    code, out, err = run("stitch", *PAIR, "--out", baseline, "--vae", *SHORT[:6], "--count", 8)
    assert code == 0, err
    assert "at the latent itself" in out

    code, out, err = run(
        "evaluate", value, "--data", "noise", "--count", 12, "--sigmas", "0.1,0.5", "--vae", baseline, "--ranking",
        "--prompts", 2, "--seeds", 3, "--steps", 2, "--out", tmp_path / "report", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text()) == found
    assert found["retrieval"]["sigma"] == [0.1, 0.5] and len(found["retrieval"]["vae"]) == 2
    assert set(found["ranking"]["cost"]) == {"stitched", "tweedie"}
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"recall.png", "ranking.png"}

    for name, method in (("plain", ("sample",)), ("best", ("best-of-n",))):
        code, _, err = run(
            "align", *method, "tiny-sd3", "--prompts", "noise", "--count", 3, "--steps", 2, "--reward", "tiny-clip",
            "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0, err
    code, out, err = run("evaluate", tmp_path / "plain", tmp_path / "best", "--data", "noise", "--json")
    assert code == 0, err
    plain, best = json.loads(out)["runs"]
    assert best["gain"]["mean"] >= 0 and best["gain"]["mean"] == pytest.approx(
        best["reward"]["mean"] - plain["reward"]["mean"], abs=1e-6
    )
    code, out, _ = run("evaluate", tmp_path / "plain", tmp_path / "best")
    assert code == 0 and "best-of-n" in out and "±" in out
    twice = [tmp_path / "plain", tmp_path / "best"] * 2
    assert "same prompts and seed" in run("evaluate", *twice, "--repetitions", 2)[2]
    code, _, err = run("evaluate", value, "--data", "noise", "--repetitions", 2)
    assert code != 0 and "runs of align alone are repeated" in err


def test_several_rewards_have_weights(run, tmp_path):
    """``tiny-other`` rates as ``tiny-clip`` does, so that their weighted sum is known: 1 - 0.25 of it."""
    sample = ("align", "sample", "tiny-sd3", "--prompts", "noise", "--count", 3, "--steps", 2, "--json")
    both = ("--reward", "tiny-clip, tiny-other", "--weights", "1,-0.25")
    ratings = {}
    for name, options in (("alone", ("--reward", "tiny-clip")), ("both", both)):
        code, out, err = run(*sample, *options, "--out", tmp_path / name)
        assert code == 0, err
        ratings[name] = json.loads(out)["reward"]["mean"]
    assert ratings["both"] == pytest.approx(0.75 * ratings["alone"], rel=1e-4) != 0
    code, out, err = run(
        "align", "draft", "tiny-sd3", "--prompts", "noise", "--count", 2, "--steps", 2, *both, "--out",
        tmp_path / "tuned", "--evaluation-prompts", 2, "--train", "updates=1", "--train", "prompts_per_update=2",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "tiny-clip + -0.25 tiny-other" in json.loads(out)["evaluations"][-1]["rewards"]
    code, out, err = run(
        "diagnose", "tiny-sd3", "--prompts", "noise", "--count", 2, "--seeds", 3, "--steps", 2, "--sigmas", "0.5",
        "--estimators", "tweedie", "--kernel", "ode", "--no-gradients", *both, "--out", tmp_path / "found", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["kernels"]["ode"]["settings"]["reward"]["name"] == "tiny-clip + -0.25 tiny-other"


def test_a_value_model_is_finetuned_further(run, tmp_path, monkeypatch):
    """From its own weights, cut as it was, without a search; more steps of one that never moves change nothing."""
    first, again, still = tmp_path / "first", tmp_path / "again", ("--batch-size", 4, "--count", 8, "--json")
    both = ("stitch", "tiny-sd3", "tiny-clip,tiny-other", "--images", "noise")
    assert run(*both, "--out", first, *SHORT, "--taps", "0", "--weights", "1,0.5", "--count", 8)[0] == 0
    monkeypatch.setattr("stitchvm.core.stitching.beginnings.search_jointly", None)
    code, _, err = run(*both, "--start-from", first, "--out", again, "--steps", 1, "--learning-rate", 1e-12, *still)
    assert code == 0, err
    begun, gone_on = (StitchedValue.from_pretrained(folder) for folder in (first, again))
    assert gone_on.names == begun.names and gone_on.weights == (1.0, 0.5)
    assert [gone_on.interface(name) for name in gone_on.names] == [begun.interface(name) for name in begun.names]
    assert gone_on.head.taps == begun.head.taps == (0,)
    ours, theirs = gone_on.branches.state_dict(), begun.branches.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9) for name in theirs)
    made = gone_on.provenance.search["start_from"]
    assert made["path"] == str(first) and made["recipe"]["steps"] == 2 and made["search"] == begun.provenance.search
    # another value model to begin with is another finetune
    moved, last = tmp_path / "moved", ("--out", tmp_path / "last", "--steps", 1, *still)
    assert run(*both, "--start-from", first, "--out", moved, "--steps", 1, "--learning-rate", 0.1, *still)[0] == 0
    assert run(*both, "--start-from", first, *last)[0] == run(*both, "--start-from", moved, *last)[0] == 0
    assert len(list((tmp_path / "last" / "work").glob("finetune-*"))) == 2
    code, _, err = run("stitch", *PAIR, "--start-from", first, "--out", again, "--steps", 1)
    assert code == 2 and "is a value model of tiny-clip, tiny-other, but tiny-clip is asked for" in err


def test_stitch_learns_from_samples_of_loras_too(run, networks, tmp_path):
    policy = moved(Policy.of(load_backbone("tiny-sd3"), LORA))
    loras = [option for name in ("a", "b") for option in ("--lora", policy.save(tmp_path / name))]
    code, _, err = run("stitch", *PAIR, "--out", tmp_path / "value", *SHORT, "--count", 8, "--generated", 0.5,
                       "--samples", 4, "--prompts", "noise", "--sampling-steps", 2, *loras)  # fmt: skip
    assert code == 0, err
    drawn = json.loads((tmp_path / "value" / "config.json").read_text())["examples"]["drawn by"]
    assert len(drawn["tuned"]) == 2


def test_skipped_images_are_named(run, tmp_path):
    from PIL import Image

    for number in range(5):
        Image.new("RGB", (16, 16), (number * 50, 90, 10)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_text("words")
    code, _, err = run("search", "tiny-sd3", "tiny-clip", "--images", tmp_path, "--cuts", "1", "--blocks", "1")
    assert code == 0
    assert err.startswith(f"skipped: {tmp_path / 'bad.png'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "tiny-sd", "tiny-clip", "--images", "noise"), "Did you mean 'tiny-sd3'"),
        (("search", *PAIR, "--cuts", "9"), "9"),
        (("search", *PAIR, "--cuts", "one"), "--cuts is 'one'"),
        (("search", *PAIR, "--criterion", "best"), "unknown search criterion 'best'"),
        (("stitch", *PAIR, "--out", "OUT", "--recipe", "papre"), "unknown recipe 'papre'"),
        (("stitch", *PAIR, "--out", "OUT", "--recipe", "none.toml"), "none.toml"),
        (("stitch", *PAIR, "--out", "OUT", "--steps", "0"), "steps"),
        (("stitch", *PAIR, "--out", "OUT", "--generated", "2"), "generated"),
        (("stitch", *PAIR, "--out", "OUT", "--interface", "4"), "write backbone cut and reward block"),
        (("stitch", *PAIR, "--out", "OUT", "--interface", "1,1,1"), "one block for each of tiny-clip"),
        (("stitch", *PAIR, "--out", "OUT", "--weights", "1,1"), "1 rewards (tiny-clip) but 2 weights"),
        (("stitch", *PAIR, "--out", "OUT", "--weights", "much"), "write numbers, such as 1,0.5"),
        (("stitch", "tiny-sd3", "tiny-clip,", "--images", "noise", "--out", "OUT"), "write one name, or several"),
        (("stitch", "tiny-sd3", "tiny-clip,tiny-clip", "--images", "noise", "--out", "OUT"), "given twice"),
        (("stitch", *PAIR, "--out", "OUT", "--generated", "0.5", "--lora", "nowhere"), "'nowhere' holds no LoRA"),
        (("stitch", *PAIR, "--out", "OUT", "--lora", "nowhere"), "the recipe takes none; set generated above 0"),
        (("stitch", *PAIR, "--out", "OUT", "--interface", "1,1", "--vae"), "give one of them"),
        (("stitch", *PAIR, "--out", "OUT", "--cuts", "1", "--start-from", "x"), "give one of them"),
        (("stitch", *PAIR, "--out", "OUT", "--taps", "1", "--start-from", "x"), "stitch takes taps from start_from"),
        (
            ("stitch", *PAIR, "--out", "OUT", "--probes", "8", "--start-from", "x"),
            "stitch takes probes from start_from",
        ),
        (("stitch", *PAIR, "--out", "OUT", "--start-from", "no-such"), "'no-such' holds no value model"),
        ((*SAMPLE, "--weights", "1,2"), "--weights are of the rewards of --reward; name those"),
        ((*SAMPLE, "--reward", "tiny-clip,tiny-other", "--weights", "1"), "2 rewards (tiny-clip, tiny-other) but 1"),
        ((*SAMPLE, "--reward", "tiny-clip", "--weights", "much"), "--weights is 'much'; write numbers"),
        ((*SAMPLE, "--reward", "tiny-clip,tiny-clip", "--weights", "1,2"), "give it once, with a larger weight"),
        (("evaluate", "OUT", "--data", "noise"), "neither a value model"),
        (("evaluate", "OUT"), "--data"),
        (("evaluate", "OUT", "OUT"), "align.json"),
        (("evaluate", "OUT", "--data", "noise", "--sigmas", "2"), "noise levels lie from 0"),
        (("evaluate", "OUT", "--data", "noise", "--steps", "2"), "--steps means nothing here: they are of --ranking"),
        (("stitch", *PAIR, "--out", "OUT", "--samples", "9"), "--samples means nothing here: the recipe paper takes"),
        (("stitch", *PAIR, "--out", "OUT", "--vae", "--taps", "1"), "--taps means nothing here"),
        (("stitch", *PAIR, "--out", "OUT", "--vae", "--blocks", "2"), "--blocks means nothing here"),
        (
            ("reproduce", "table1", "--world", "noise", "--out", "OUT", "--set", "normaliser=norm"),
            "--set normaliser: that is an option of its own, --normaliser",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    out = str(tmp_path / "out")
    code, printed, err = run(*(out if argument == "OUT" else argument for argument in arguments))
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert not printed


def test_quickstart_prints_the_result_and_where_the_report_is(run, monkeypatch, tmp_path):
    from stitchvm.core import quickstart

    asked = []

    def job(out, **options):
        asked.append((out, options))
        return summary()

    monkeypatch.setattr(quickstart, "quickstart", job)
    code, out, _ = run("quickstart", "--out", tmp_path, "--fast", "--seed", 3)
    assert code == 0
    assert asked == [(tmp_path, {"fast": True, "seed": 3, "progress": True})]
    for words in ("FK, stitched", "0.261 ± 0.005", "89%", "raises the reward by 0.030", str(tmp_path / "report.html")):
        assert words in out.replace("\n", " "), words
    code, out, _ = run("quickstart", "--out", tmp_path, "--json")
    assert json.loads(out) == summary()


def test_every_option_is_documented(run):
    for name in ("search", "stitch", "evaluate", "quickstart", "matrix"):
        code, out, _ = run(name, "--help")
        assert code == 0
        assert "--json" in out and "--seed" in out


def test_lists_of_numbers():
    assert numbers("2,4-6,4", "--cuts") == (2, 4, 5, 6)
    assert levels("0,0.5,1", "--sigmas") == (0, 0.5, 1)
    for wrong in ("", "a", "3-1", "1;2"):
        with pytest.raises(ConfigError, match="--cuts"):
            numbers(wrong, "--cuts")


def test_a_recipe_file_is_strict(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('steps = 7\nnoise = "uniform"\n')
    assert read_recipe(str(file), {"seed": 3}).steps == 7
    assert read_recipe("quick", {"steps": 5}).steps == 5
    file.write_text('base = "quick"\nwarmup_steps = 7\n')
    assert read_recipe(str(file), {}) == attrs.evolve(recipe("quick"), warmup_steps=7)
    for text, message in (
        ("stepz = 7", "unknown key 'stepz', did you mean 'steps'"),
        ('steps = "7"', "expected a whole number"),
        ('noise = "pink"', "noise"),
        ('base = "slow"', "unknown recipe 'slow'; choose one of paper"),
        ("steps = ", "not valid TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_recipe(str(file), {})
