"""What a diagnosis writes, what of it is repeated, and its command."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from analytic import GaussianBackbone, LinearReward, QuadraticReward
from families import write_clip
from pipelines import write_pipeline
from stitchvm import core
from stitchvm.core import ConfigError, CostMeter, MonteCarlo, NonFiniteError, Ode, Sde, Tweedie, registry
from stitchvm.core.diagnosis import report as diagnosis_report
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from test_policy import moved
from toy_world import DATASET
from training_worlds import LORA

QUIET = {"guidance_scale": 1.0, "progress": False}


def test_a_folder_holds_each_kernel_and_none_is_repeated(tmp_path, monkeypatch):
    backbone, reward = GaussianBackbone(), QuadraticReward()
    estimators = {"tweedie": Tweedie(reward), "mc-1": MonteCarlo(reward, rollouts=1, steps=2)}
    settings = {"seeds": 3, "steps": 5, "gradient_rollouts": 2, "rollout_steps": 2, **QUIET}

    drawn = []
    monkeypatch.setattr(
        diagnosis_report, "diagnosis_panels", lambda part, name, path: [drawn.append(name), path.touch()]
    )

    def run(kernels, **changed):
        with CostMeter() as cost:
            report = diagnosis_report.run_diagnosis(backbone, estimators, reward, ["0", "1"], tmp_path,
                                                    kernels=kernels, **{**settings, **changed})  # fmt: skip
        assert json.loads((tmp_path / "diagnosis.json").read_text()) == report
        return report, cost.passes

    first, spent = run({"sde": Sde()})
    assert spent["denoiser"] > 0
    both, _ = run({"ode": Ode(), "sde": Sde()})
    assert both["kernels"]["sde"] == first["kernels"]["sde"] and list(both["kernels"]) == ["ode", "sde"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"diagnosis-ode.png", "diagnosis-sde.png"}
    drawn.clear()
    assert run({"ode": Ode(), "sde": Sde()}) == (both, Counter())
    assert drawn == ["ode", "sde"], "a picture drawn by an earlier version is not kept"
    assert run({"ode": Ode(), "sde": Sde()}, batch=2) == (both, Counter()), "it changes nothing"
    for wrong in ({"batch": 0}, {"resolution": -2}, {"guidance_scale": -3.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            run({"ode": Ode()}, **wrong)
    (tmp_path / "parts" / "ode.json").write_text("{")
    assert run({"ode": Ode(), "sde": Sde()})[1]["denoiser"] == spent["denoiser"]
    for changed in ({"seed": 1}, {"kernels": {"sde": Sde(scale=1.0)}}):
        assert run(**{"kernels": {"sde": Sde()}, **changed})[1]["denoiser"] == spent["denoiser"]


@pytest.mark.parametrize(("stop", "lost"), [(3, 1), (6, 0), (7, 0)], ids=["trajectories", "between", "gradients"])
def test_an_interrupted_kernel_goes_on_where_it_stopped(tmp_path, monkeypatch, stop, lost):
    backbone, reward = GaussianBackbone(), QuadraticReward()
    read, calls = Tweedie.__call__, []

    def counted(self, *arguments):
        if len(calls) == stop and folder == "interrupted":
            raise KeyboardInterrupt
        calls.append(folder)
        return read(self, *arguments)

    monkeypatch.setattr(Tweedie, "__call__", counted)

    def run():
        part = diagnosis_report.run_diagnosis(
            backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1"], tmp_path / folder.split()[0],
            kernels={"sde": Sde()}, judges={"bright": lambda images, prompts: images.mean((1, 2, 3))}, seeds=3, steps=5,
            sigmas=(0.75, 0.5), gradient_rollouts=2, gradient_prompts=1, rollout_steps=2, batch=2, **QUIET,
        )["kernels"]["sde"]  # fmt: skip
        return re.sub(r'"(seconds|peak_memory)": [^,}]+', "", json.dumps(part))

    folder = "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run()
    folder = "interrupted again"
    found = run()
    # 8 readings are a whole: two levels of three batches, and the gradient at two levels; a batch is lost at most
    assert Counter(calls) == {"interrupted": stop, "interrupted again": 8 - stop + lost}
    folder = "undisturbed"
    assert found == run()
    assert [path.name for path in (tmp_path / "interrupted" / "parts").iterdir()] == ["sde.json"]


def test_what_is_not_finite_is_read_again(tmp_path):
    backbone, reward = GaussianBackbone(), QuadraticReward()

    def run():
        return diagnosis_report.run_diagnosis(backbone, {"broken": broken}, reward, ["0", "1"], tmp_path, seeds=3,
                                              kernels={"ode": Ode()}, steps=4, gradients=False, **QUIET)  # fmt: skip

    class Broken:
        lost = True

        def __call__(self, latents, *_):
            return latents.mean((1, 2, 3)) / (0.0 if self.lost else 1.0)

        def __repr__(self):
            return "Broken()"

    broken = Broken()
    with pytest.raises(NonFiniteError, match="broken gave no finite value"):
        run()
    broken.lost = False
    assert all(run()["kernels"]["ode"]["estimators"]["broken"]["rank"])


def test_what_judges_say_is_told_beside_and_makes_a_kept_kernel_another(tmp_path):
    backbone, reward = GaussianBackbone(), LinearReward()
    judges = {"bright": lambda images, prompts: images.mean((1, 2, 3)),
              "silent": lambda images, prompts: [0] * len(images)}  # fmt: skip

    def run(judges):
        return diagnosis_report.run_diagnosis(
            backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1"], tmp_path, kernels={"ode": Ode()}, seeds=5,
            steps=4, sigmas=(0.75, 0.5), gradients=False, judges=judges, **QUIET,
        )["kernels"]["ode"]  # fmt: skip

    assert run(None)["judges"] == {}
    found = run(judges)["judges"]
    assert found["silent"] == {"mean": {"mean": 0, "stderr": 0}, "constant_prompts": 2, "rank": None, "ranks": None}
    bright = found["bright"]
    assert bright["constant_prompts"] == 0 and bright["rank"]["mean"] < 1, "the reward weighs channels, it does not"
    # under the ODE a linear reward's order is settled at every latent: Tweedie's estimate ranks as the reward will
    assert bright["ranks"] == {"tweedie": [bright["rank"]] * 2}
    with Image.open(tmp_path / "diagnosis-ode.png") as picture:
        assert picture.width > picture.height > 700, "two rows: the judge has a panel of its own"


NAMES = """
[backbones.tiny-sd3]
family = "mmdit"
path = "pipeline"
resolution = 16
architecture = { max_sequence_length = 3 }
[rewards.tiny-clip]
family = "clip"
path = "clip"
"""


def register_pair(folder: Path, more: str = "") -> None:
    """``tiny-sd3`` and ``tiny-clip``, written to ``folder``, with ``more`` lines of the registry."""
    write_pipeline(folder / "pipeline")
    write_clip(folder / "clip")
    (folder / "names.toml").write_text(NAMES + more)
    registry().add(folder / "names.toml")


def test_the_command_measures_values_beside_the_others(run, tmp_path):
    register_pair(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 90, 200 - 50 * number)).save(images / f"{number}.png")
    code, _, err = run("stitch", "tiny-sd3", "tiny-clip", "--images", images, "--out", tmp_path / "value", "--vae",
                       "--steps", 1, "--batch-size", 4, "--probes", 4)  # fmt: skip
    assert code == 0, err
    call = ("diagnose", "tiny-sd3", "--value", tmp_path / "value", "--prompts", tmp_path / "prompts.txt",
            "--seeds", 3, "--steps", 2, "--sigmas", "0.9", "--estimators", "stitched,tweedie,mc-2", "--kernel", "sde",
            "--rollout-steps", 1, "--gradient-rollouts", 2, "--gradient-prompts", 1,
            "--out", tmp_path / "out")  # fmt: skip
    code, out, err = run(*call, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text()) == report
    part = report["kernels"]["sde"]
    assert list(part["estimators"]) == ["stitched", "tweedie", "mc-2"]
    assert part["settings"]["reward"]["name"] == "tiny-clip" and part["settings"]["guidance_scale"] == 3.0
    assert part["estimators"]["mc-2"]["cost"]["gradient"]["denoiser"] == 2
    with Image.open(tmp_path / "out" / "diagnosis-sde.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert set(part["estimators"]["stitched"]["beside"]) == {"tweedie", "mc-2"}
    code, out, err = run(*call)
    assert code == 0, err
    for words in ("sde samples of 2 prompts", "rank in a prompt", "share of tweedie's", "gradient cosine",
                  "milliseconds", "diagnosis.json"):  # fmt: skip
        assert words in out


def test_the_samples_of_a_lora_are_read_by_the_heads_of_the_plain_backbone(run, tmp_path):
    register_pair(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    backbone, clip = core.load_backbone("tiny-sd3"), core.load_reward("tiny-clip")
    value = core.stitch(backbone, clip, images=torch.rand(8, 3, 16, 16), out=tmp_path / "value", progress=False,
                        interface=(1, 1), probes=4, recipe=FinetuneSettings(steps=1, batch_size=4))  # fmt: skip
    policy = moved(core.Policy.of(backbone, LORA), 0.3)
    policy.save(tmp_path / "lora")
    call = ("diagnose", "tiny-sd3", "--value", tmp_path / "value", "--prompts", tmp_path / "prompts.txt", "--seeds", 3,
            "--steps", 2, "--sigmas", "0.9", "--estimators", "stitched", "--kernel", "ode", "--no-gradients",
            "--json", "--out", tmp_path / "out")  # fmt: skip
    reports = []
    for options in ((), ("--lora", tmp_path / "lora")):
        code, out, err = run(*call, *options)
        assert code == 0, err
        reports.append(json.loads(out)["kernels"]["ode"])
    exact = core.diagnose(
        policy.backbone, {"stitched": core.Stitched(value)}, clip, ["a cat", "a dog"], seeds=3, steps=2, sigmas=(0.9,),
        gradients=False, progress=False,
    ).report()  # fmt: skip
    plain, tuned = (report["estimators"]["stitched"]["bias"] for report in reports)
    assert tuned == pytest.approx(exact["estimators"]["stitched"]["bias"], abs=1e-5)
    assert plain != pytest.approx(tuned, abs=1e-4)
    assert reports[0]["settings"]["backbone"]["weights"] != reports[1]["settings"]["backbone"]["weights"]


def test_the_detector_of_a_dataset_is_foreseen_too(run, install, tmp_path):
    register_pair(tmp_path, '[datasets.toy]\nload = "toy_data:Toy"\n')
    install("toy-data", {"toy_data": DATASET})
    code, out, err = run("diagnose", "tiny-sd3", "--reward", "tiny-clip", "--prompts", "toy", "--count", 3,
                         "--seeds", 4, "--steps", 2, "--sigmas", "0.9", "--estimators", "tweedie", "--kernel", "ode",
                         "--no-gradients", "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["kernels"]["ode"]["judges"]["detector"]
    assert 0 < found["mean"]["mean"] < 1 and found["constant_prompts"] < 3
    assert "rank in a prompt, of the detector" in out and "Of the final reward itself" in out


def test_the_command_says_what_is_wrong(run, tmp_path):
    def error(*options):
        return run("diagnose", "sd3.5-medium", "--prompts", "none.txt", "--out", tmp_path, *options)[2]

    assert "choose one of both, ode" in error("--kernel", "none")
    assert "choose one with noise: ancestral" in error("--rollout-kernel", "ode")
    assert "'mc-0' is none; write stitched, tweedie or mc-N" in error("--estimators", "tweedie,mc-0")
    assert "name the value model's folder by --value" in error("--estimators", "stitched")
    assert "--value measures nothing" in error("--estimators", "tweedie", "--value", tmp_path)
