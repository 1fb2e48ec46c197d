"""``align``: pairing, resuming, batching, what it writes, and one clear error for each mistake."""

from __future__ import annotations

import json
from typing import ClassVar

import attrs
import numpy as np
import pytest
import torch
from PIL import Image

from analytic import GaussianBackbone, LinearReward, QuadraticReward, exact_stitched
from stitchvm.core import (
    AlignProblem,
    ConfigError,
    Denoiser,
    OutputError,
    Particles,
    Stitched,
    Tweedie,
    UnknownNameError,
    align,
    load_aligner,
    sample,
)
from stitchvm.core.alignment.particles import initial_noise
from stitchvm.core.cli.options import key_values

PROMPTS = ["0", "1", "2", "-1", "0.5"]


def run(method="fk-steering", value="tweedie", prompts=PROMPTS, backbone=None, reward=None, **settings):
    settings = {"steps": 10, "progress": False, **settings}
    return align(method, backbone or GaussianBackbone(), value, prompts, reward=reward or LinearReward(), **settings)


def same(a, b) -> bool:
    tables = ("latents", "log_weights", "rewards", "ancestry")
    return torch.equal(a.pixels, b.pixels) and all(
        torch.equal(getattr(a.particles, name), getattr(b.particles, name)) for name in tables
    )


# -- what it computes


def test_the_plain_method_is_the_plain_sampler():
    backbone = GaussianBackbone()
    result = run("sample", None, ["0", "1"], backbone=backbone, guidance_scale=3.0)
    denoiser = Denoiser(backbone, backbone.encode_prompts(["0", "1"]), backbone.null_condition(), 3.0)
    clean = sample(denoiser, initial_noise(0, [0, 1], 1, (3, 2, 2))[:, 0], backbone.sigmas(10, (2, 2)))
    assert torch.allclose(result.particles.latents[:, 0], clean, atol=1e-6)
    assert torch.allclose(result.rewards, LinearReward().expectation(clean, 0.0), atol=1e-5)


def test_a_method_by_name_draws_as_many_proposals_as_it_says_itself():
    result = run("svdd", prompts=["0"], steps=4)
    assert result.settings["method_settings"]["proposals"] == 20
    assert run("svdd", prompts=["0"], steps=4, proposals=2).settings["method_settings"]["proposals"] == 2


def test_rollouts_are_of_the_runs_seed():
    for seed in (0, 3):
        assert run("sample", "monte-carlo", ["0"], steps=2, seed=seed).settings["estimator"]["seed"] == seed


class Unsure(Tweedie):
    """No number for the first of the samples."""

    def __call__(self, *arguments):
        value = super().__call__(*arguments).clone()
        value[0] = torch.nan
        return value


def test_particles_without_a_value_are_counted_in_the_report():
    with pytest.warns(RuntimeWarning, match="these particles are dropped"):
        result = run("fk-steering", Unsure(LinearReward()), ["0", "1"], particles=4)
    dropped = [entry["dropped"] for entry in result.report()["samples"]]
    assert dropped[0] == len(result.particles.history) > 0 and dropped[1] == 0


def test_methods_of_one_seed_share_their_starting_noise():
    plain, best = run("sample", None), run("best-of-n", None, particles=6)
    assert torch.equal(best.particles.latents[:, 0], plain.particles.latents[:, 0])
    assert torch.equal(best.rewards, best.particles.rewards.amax(1))
    assert (best.rewards >= plain.rewards).all()
    fk = run(kernel="ode", strength=0.0, window=(1.0, 1.0), particles=6)
    assert torch.equal(fk.particles.latents, best.particles.latents)
    assert not torch.equal(run("sample", None, seed=1).particles.latents, plain.particles.latents)


@pytest.mark.parametrize("value", ["tweedie", "stitched"])
def test_steering_raises_the_reward_for_every_kind_of_value(value):
    """Over the same kernel unsteered, paired by prompt and seed, by the gain the closed form promises."""
    backbone, reward = GaussianBackbone(), LinearReward()
    steered = exact_stitched(backbone, reward) if value == "stitched" else value
    settings = {"backbone": backbone, "prompts": ["0"] * 30, "particles": 64, "guidance_scale": 1.0, "batch": 2048}
    fk, free = (run(value=steered, strength=strength, **settings) for strength in (3.0, 0.0))
    gain = (fk.particles.weights * fk.particles.rewards).sum(1) - free.particles.rewards.mean(1)
    assert gain.mean() > 8 * gain.std() / 30**0.5
    kernel = load_aligner("fk-steering")().transition_kernel()
    mean, variance = backbone.marginal(kernel, backbone.sigmas(10, (2, 2)))
    whole = (reward.tilted(mean, variance, 3.0)[0] - mean) @ reward.coefficients()[0].flatten()
    assert 0.85 * whole < gain.mean() < 1.1 * whole


def test_each_prompt_is_denoised_under_its_own_condition():
    result = run("sample", None, ["0", "5"], guidance_scale=1.0)
    assert result.particles.latents[1].mean() - result.particles.latents[0].mean() > 3


def test_a_value_model_brings_its_reward_along():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    value = exact_stitched(backbone, reward)
    result = align("fk-steering", backbone, value, ["0"], steps=6, progress=False)
    assert result.settings["reward"]["name"] == "QuadraticReward"
    assert result.settings["estimator"]["name"] == "Stitched"
    assert torch.allclose(result.particles.rewards[0], reward.expectation(result.particles.latents[0], 0.0), atol=1e-4)
    assert same(result, align("fk-steering", backbone, Stitched(value), ["0"], steps=6, progress=False))


@pytest.mark.parametrize("batch", [1, 3, 8, 1000])
def test_results_do_not_depend_on_the_batch_size(batch):
    assert same(run(proposals=2), run(proposals=2, batch=batch))


def test_a_prompts_result_does_not_depend_on_those_after_it():
    few, all_of_them = run(prompts=PROMPTS[:2]), run()
    assert torch.equal(few.particles.latents, all_of_them.particles.latents[:2])


def test_the_cost_is_what_ran():
    result = run(particles=4, guidance_scale=3.0)
    looks = len(result.particles.history)
    passes = {k: v for k, v in result.cost.items() if k not in ("seconds", "peak_memory")}
    assert looks == 2
    assert passes == {"denoiser": 5 * 4 * 10 * 2, "decoder": 5 * 4 * 3, "reward": 5 * 4 * 3}
    assert result.cost["seconds"] > 0


# -- what it writes


def test_a_saved_run_is_complete(tmp_path):
    result = run(out=tmp_path / "run", particles=3)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"parts", "align.json", "grid.png", *(f"{n:04d}.png" for n in range(5))}
    assert not [path for path in (tmp_path / "run").rglob("*") if ".tmp" in path.name]
    report = json.loads((tmp_path / "run" / "align.json").read_text())
    assert [entry["prompt"] for entry in report["samples"]] == PROMPTS
    assert report["reward"]["mean"] == pytest.approx(float(result.rewards.mean()), abs=1e-6)
    assert report["seed"] == 0
    assert report["cost"] == result.cost
    assert len(report["resampling"]) == len(report["samples"][0]["ess"]) == 2
    for number, entry in enumerate(report["samples"]):
        assert sum(entry["weights"]) == pytest.approx(1.0, abs=1e-5)
        assert entry["reward"] == max(entry["particle_rewards"]) == entry["particle_rewards"][entry["best"]]
        pixels = np.asarray(Image.open(tmp_path / "run" / entry["file"]))
        assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), result.pixels[number])
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.size == (3 * 4 - 2, 2 * 4 - 2)


def test_the_pictures_are_the_best_particles():
    backbone = GaussianBackbone()
    result = run("best-of-n", None, backbone=backbone, particles=5)
    best = result.particles.latents[torch.arange(5), result.particles.best]
    assert torch.equal(result.pixels, (backbone.decode_latents(best).clamp(0, 1) * 255).round().byte())
    assert result.images.shape == (5, 3, 2, 2)


@attrs.frozen
class Interrupted:
    """FK steering that is killed when it has run ``after`` chunks."""

    default_particles: ClassVar[int] = 4
    after: int
    inner: object = attrs.field(factory=lambda: load_aligner("fk-steering")(), repr=False)
    seen: list[int] = attrs.field(factory=list, eq=False)

    def run(self, problem: AlignProblem) -> Particles:
        if len(self.seen) == self.after:
            raise KeyboardInterrupt
        self.seen.append(problem.prompts)
        return self.inner.run(problem)


def test_an_interrupted_run_continues_and_ends_as_if_never_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("stitchvm.core.alignment.run.plain", lambda method: {})
    whole = run(Interrupted(9), out=tmp_path / "whole", batch=8)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(1), out=tmp_path / "run", batch=8)
    assert not (tmp_path / "run" / "align.json").exists()
    (tmp_path / "run" / "parts" / "0001.safetensors").write_bytes(b"half a file")
    method = Interrupted(9)
    again = run(method, out=tmp_path / "run", batch=4)
    assert method.seen == [1, 1, 1, 1]
    assert same(again, whole)
    assert {k: v for k, v in again.cost.items() if k in ("denoiser", "decoder")} == {
        k: v for k, v in whole.cost.items() if k in ("denoiser", "decoder")
    }
    for look, other in zip(again.particles.history, whole.particles.history, strict=True):
        assert (look.step, look.sigma) == (other.step, other.sigma)
        for name in ("values", "ess", "resampled", "ancestors"):
            assert torch.equal(getattr(look, name), getattr(other, name))
    finished = Interrupted(0)
    assert same(run(finished, out=tmp_path / "run"), whole)
    assert finished.seen == []


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed was 0, now 1"), ({"steps": 11}, "steps was 10, now 11"),
     ({"strength": 3.0}, "(method_settings.strength was 10.0, now 3.0)"),
     ({"prompts": ["7"]}, "prompts"), ({"reward": QuadraticReward()}, "reward")],
    ids=["seed", "steps", "strength", "prompts", "reward"],
)  # fmt: skip
def test_a_run_with_other_settings_is_not_continued(tmp_path, change, named):
    run(out=tmp_path / "run")
    with pytest.raises(ConfigError, match="other settings.*Choose another folder") as caught:
        run(out=tmp_path / "run", **change)
    assert named in str(caught.value)


def test_a_retrained_value_model_is_another_setting(tmp_path):
    backbone, reward = GaussianBackbone(), LinearReward()
    value = exact_stitched(backbone, reward)
    settings = {"backbone": backbone, "prompts": ["0"], "out": tmp_path / "run"}
    run(value=value, **settings)
    value.branches[0].layer.linear.bias.data += 0.1
    with pytest.raises(ConfigError, match=r"\(estimator.weights was"):
        run(value=value, **settings)


def test_a_retrained_backbone_is_another_setting(tmp_path):
    run("sample", None, backbone=GaussianBackbone(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"\(backbone.weights was"):
        run("sample", None, backbone=GaussianBackbone(deviation=0.9), out=tmp_path / "run")


def test_an_output_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    method = Interrupted(9)
    with pytest.raises(OutputError, match="cannot write"):
        run(method, out=tmp_path / "file" / "run")
    assert method.seen == []


# -- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fk-stearing"}, "fk-steering"),
        ({"stength": 3.0}, "unknown key 'stength', did you mean 'strength'"),
        ({"strength": "high"}, "expected a number, got 'high'"),
        ({"interval": 1.5}, "expected a whole number"),
        ({"strength": -2.0}, "'strength' must be >= 0"),
        ({"window": (0.9, 0.1)}, "rising fractions"),
        ({"potential": "sum"}, "potential"),
        ({"method": "best-of-n", "proposals": 2}, "proposals"),
        ({"method": "sample", "particles": 4}, "best-of-n draws several"),
        ({"value": None}, "needs a value"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a prompt"}, "list of strings"),
        ({"prompts": ["a", 3]}, "list of strings"),
        ({"particles": 0}, "particles is 0; give a whole number from 1 on"),
        ({"steps": 0}, "steps is 0; give a whole number from 1 on"),
        ({"batch": 0}, "batch is 0; give a whole number from 1 on"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 on"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; give a finite number from 0 on"),
        ({"resolution": 0}, "resolution is 0 pixels"),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_error(settings, message):
    with pytest.raises((ConfigError, UnknownNameError)) as caught:
        run(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_is_needed_and_must_be_the_values():
    backbone = GaussianBackbone()
    with pytest.raises(ConfigError, match="no reward to choose"):
        align("best-of-n", backbone, None, ["0"], progress=False)
    with pytest.raises(ConfigError, match="estimates LinearReward but reward is QuadraticReward"):
        align("fk-steering", backbone, Tweedie(LinearReward()), ["0"], reward=QuadraticReward(), progress=False)


def test_a_reward_of_reference_images_cannot_steer_by_prompts():
    class References(LinearReward):
        condition_kind = "images"

    with pytest.raises(ConfigError, match="reference images"):
        run(reward=References())


def test_a_configured_method_takes_no_further_settings():
    with pytest.raises(ConfigError, match="configured already; leave out strength"):
        run(load_aligner("fk-steering")(), strength=2.0)


# -- the command


def test_settings_on_the_command_line():
    given = ["strength=20", "window=[0.1, 0.5]", "kernel=ode", "ess_threshold=0.5"]
    found = key_values(given, "--set", "strength=20")
    assert found == {"strength": 20, "window": [0.1, 0.5], "kernel": "ode", "ess_threshold": 0.5}


@pytest.fixture
def stitchvm(run, monkeypatch):
    """The command with the analytic networks behind the names."""
    monkeypatch.setattr("stitchvm.core.alignment.run.load_backbone", lambda name: GaussianBackbone())
    monkeypatch.setattr("stitchvm.core.joint.load_reward", lambda name, device: LinearReward())
    return run


def test_the_command_writes_and_reports(stitchvm, tmp_path):
    (tmp_path / "prompts.txt").write_text("0\n\n1\n2\n")
    arguments = ["align", "fk-steering", "gauss", "--estimator", "tweedie", "--reward", "linear", "--prompts",
                 str(tmp_path / "prompts.txt"), "--count", "2", "--particles", "3", "--steps", "10", "--seed", "4",
                 "--set", "strength=2", "--set", "window=[0.2, 0.6]", "--out", str(tmp_path / "run")]  # fmt: skip
    code, out, _ = stitchvm(*arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert report == json.loads((tmp_path / "run" / "align.json").read_text())
    assert report["settings"]["method_settings"]["strength"] == 2.0
    expected = run(prompts=["0", "1"], particles=3, seed=4, strength=2.0, window=(0.2, 0.6))
    assert [entry["reward"] for entry in report["samples"]] == pytest.approx(expected.rewards.tolist(), abs=1e-6)
    code, out, _ = stitchvm(*arguments)
    assert code == 0
    assert "mean LinearReward" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--value", "x", "--estimator", "tweedie"], "--value and --estimator"), (["--estimator", "twedie"], "twedie"),
     (["--estimator", "tweedie", "--set", "stength=2"], "did you mean 'strength'"),
     (["--estimator", "tweedie", "--set", "strength"], "write KEY=VALUE"),
     (["--estimator", "tweedie", "--set", "guidance_scale=2"], "option of its own, --guidance-scale"),
     (["--value", "nowhere"], "holds no value model")],
    ids=["both", "estimator", "setting", "no value", "option", "value"],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(stitchvm, tmp_path, extra, message):
    (tmp_path / "prompts.txt").write_text("0\n")
    code, out, err = stitchvm("align", "fk-steering", "gauss", "--reward", "linear", "--prompts",
                              str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run"), *extra)  # fmt: skip
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
