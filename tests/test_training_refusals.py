"""What a training, a LoRA over a pipeline, and a run to be continued refuse, each before any work and by its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler

import families
from pipeline_calls import linear_value
from pipelines import open_pipeline, write_pipeline
from stitchvm import core
from stitchvm.core import ConfigError, LoraSettings, Policy, StitchedValue, TrainSettings
from stitchvm.core.training.evaluation import _fallen
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from stitchvm.plugins.aligners.fk_steering import FKSteering
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo
from test_policy import moved
from test_training import PROMPTS, evaluated, lora_of, run
from training_worlds import Brightness

LORA = LoraSettings(rank=2, alpha=4)
PLAN: dict[str, Any] = {"updates": 1, "prompts_per_update": 1, "lora": {"rank": 2, "alpha": 4}, "tracker": None}


def train(out: Path, **settings: Any) -> core.TrainResult:
    given = {"training": PLAN, "reward": families.clip(), "steps": 3, "progress": False, **settings}
    method, backbone = given.pop("method", Draft()), given.pop("backbone", None) or families.mmdit()
    return core.train(method, backbone, given.pop("value", Brightness()), PROMPTS, out=out, **given)


@pytest.mark.parametrize(("settings", "said"), [
    ({"resolution": 17}, "resolution is 17 pixels; .* needs multiples of"),
    ({"resolution": 0}, "resolution is 0 pixels"),
    ({"resolution": (16, 17)}, "resolution is 16 x 17 pixels"),
    ({"guidance_scale": -1.0}, "guidance_scale is -1.0; give a finite number from 0 on"),
    ({"training": {**PLAN, "update": 3}}, "unknown key 'update', did you mean 'updates'"),
    ({"training": {**PLAN, "lora": False}}, "lora: expected a table, got False"),
    ({"judges": {"two": lambda images, prompts: 0.5}}, "judge 'two' gave \\[\\] for 3 images; give one score each"),
    ({"held_out_rewards": [families.clip()]}, "is what two evaluations would be called"),
    ({"value": "tweedie", "method": Draft(backward_steps=0, stop=(2, 3))}, "a window to stop in before step 3"),
    ({"value": "tweedie", "method": Draft(stop=(2, 9))}, "stop is \\[2, 9\\]"),
])  # fmt: skip
def test_settings_that_cannot_be_followed(settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train(tmp_path, **settings)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("settings", [
    {"updates": 0}, {"updates": 1.5}, {"learning_rate": math.inf}, {"clip_norm": math.inf}, {"weight_decay": math.nan},
    {"lora": {"rank": 4}}, {"mixed_precision": "fp16"}, {"head": "both"},
])  # fmt: skip
def test_settings_of_a_training_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TrainSettings(**settings)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 1.5}, {"targets": "to_q"}, {"targets": ()}])
def test_settings_of_a_lora_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LoraSettings(**settings)


@pytest.mark.parametrize("method", [
    lambda: Draft(samples_per_prompt=0), lambda: DiffusionNft(mix_beta=-1.0), lambda: FlowGrpo(sampler="ode"),
    lambda: FKSteering(ess_threshold=2.0),
])  # fmt: skip
def test_settings_of_a_method_out_of_range(method):
    with pytest.raises(ConfigError):
        method()


def test_a_table_of_settings_begins_with_what_the_method_is_published_with(tmp_path):
    found = train(tmp_path / "a", held_out_rewards=[]).record.settings["training"]
    assert (found["learning_rate"], found["weight_decay"]) == (5e-5, 0.0)
    asked = train(tmp_path / "b", training={**PLAN, "learning_rate": 1e-3}, resolution=(16, 16)).record.settings
    assert (asked["training"]["learning_rate"], asked["training"]["weight_decay"]) == (1e-3, 0.0)


def test_a_run_goes_on_only_by_what_it_was_evaluated_by(tmp_path):
    judge = {"bright": lambda images, prompts: images.mean((1, 2, 3))}
    train(tmp_path / "judged", judges=judge)
    train(tmp_path / "plain")
    more = {**PLAN, "updates": 2}
    with pytest.raises(ConfigError, match="evaluated by ClipReward, bright, now by .*same held-out rewards and judges"):
        train(tmp_path / "judged", training=more)
    with pytest.raises(ConfigError, match="now by .*bright"):
        train(tmp_path / "plain", training=more, judges=judge)
    assert train(tmp_path / "judged", training=more, judges=judge).record.updates == 2


def test_a_run_goes_on_only_under_the_guidance_that_the_network_was_given(tmp_path):
    build = families.flux
    for guidance in (3.5, 1.0):
        backbone = build()
        backbone.guidance = guidance
        if guidance == 3.5:
            train(tmp_path, backbone=backbone)
            continue
        with pytest.raises(ConfigError, match="guidance was 3.5, now 1.0"):
            train(tmp_path, backbone=backbone, training={**PLAN, "updates": 2})


def test_one_prompt_alone_warns_of_nothing():
    first, now = evaluated(0, {"trained": [0.9], "other": [0.9]}), {"trained": 0.1, "other": 0.1}
    assert _fallen({name: torch.tensor([score]) for name, score in now.items()}, [first]) == []


# -- LoRAs over LoRAs --------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Any, Path]:
    """A pipeline that has loaded a LoRA, and the folder that it is in."""
    moved(Policy.of(families.mmdit(), LORA)).save(tmp_path / "lora")
    write_pipeline(tmp_path / "pipe")
    pipe = open_pipeline(tmp_path / "pipe")
    pipe.load_lora_weights(str(tmp_path / "lora"))
    return pipe, tmp_path / "lora"


def test_a_second_lora_over_the_first_is_refused(adapted, tmp_path):
    """peft would switch the first one off, and a policy would begin as another network than it is told to."""
    pipe, lora = adapted
    backbone = core.backbone_from(pipe)
    for asked in (LORA, None):
        with pytest.raises(ConfigError, match="has a LoRA already .*fuse_lora"):
            Policy.of(backbone, asked)
    with pytest.raises(ConfigError, match="has a LoRA already"):
        core.align("sample", backbone, None, PROMPTS, lora=lora, reward=families.clip(), progress=False)


def test_fused_it_is_part_of_the_weights_and_a_policy_begins_there(adapted):
    pipe, _ = adapted
    before = core.backbone_from(pipe)
    x, condition = families.mmdit_input(before)
    expected = before.upstream(x, condition)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    policy = Policy.of(core.backbone_from(pipe), LORA)
    torch.testing.assert_close(policy.backbone.upstream(x, condition), expected, rtol=1e-4, atol=1e-5)


def test_a_value_notices_a_lora_that_is_put_into_its_blocks(adapted):
    pipe, lora = adapted
    pipe.unload_lora_weights()
    at_latents, backbone = linear_value(pipe), core.backbone_from(pipe)
    head = core.Head(backbone, 1)
    value = StitchedValue(head, {}, backbone.null_condition())
    latents = torch.randn(1, backbone.latent_channels, 8, 8)
    with torch.no_grad():
        before = value.head(backbone.noisy(latents, 0.5), value.null)
        pipe.load_lora_weights(str(lora))
        assert not torch.equal(value.head(backbone.noisy(latents, 0.5), value.null), before)
        with pytest.raises(ConfigError, match="backbone has .* in it and had no LoRA .*Load a model apart"):
            value.features(latents, 0.5)
        assert at_latents(latents, 0.5).isfinite().all()  # reads no block
        pipe.unload_lora_weights()
        torch.testing.assert_close(value.head(backbone.noisy(latents, 0.5), value.null), before)


def test_a_flow_pipeline_with_another_kind_of_scheduler_is_refused(tmp_path):
    write_pipeline(tmp_path / "pipe")
    pipe = open_pipeline(tmp_path / "pipe")
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    with pytest.raises(ConfigError, match="scheduler is a UniPCMultistepScheduler, whose noise levels are not read"):
        core.backbone_from(pipe)


def test_a_value_that_is_nowhere_is_one_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(core.ArtefactError, match="there is no folder 'nope/value' with a value model here"):
        StitchedValue.from_pretrained("nope/value")
    with pytest.raises(core.ArtefactError, match=f"{tmp_path}/value.* holds no value model"):
        StitchedValue.from_pretrained("~/value")


def test_out_may_begin_with_a_tilde_for_the_tracker_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(Draft(), Path("~/tuned"), updates=1, tracker="tensorboard")
    assert (tmp_path / "tuned" / "stitchvm").is_dir() and not (tmp_path / "~").exists()
    assert lora_of(tmp_path / "tuned")


def test_a_distilled_backbone_takes_no_classifier_free_guidance(tmp_path):
    with pytest.raises(ConfigError, match="guidance_scale is 3, but .* was distilled to need no classifier-free"):
        core.train("draft", families.flux(), None, PROMPTS, reward=families.clip(), guidance_scale=3.0, out=tmp_path)
