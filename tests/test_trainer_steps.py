"""What the trainer makes of a method's losses: the optimiser's steps, the averages, the prompts, what is evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import families
from analytic import LinearReward
from stitchvm import core
from stitchvm.core import LoraSettings, Policy, TrainSettings
from stitchvm.core.alignment.particles import initial_noise
from stitchvm.core.checkpoints import under
from stitchvm.core.files import read_tensors
from stitchvm.core.records import name_of
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from test_policy import moved
from test_reuse import family
from test_training import PROMPTS, assert_equal, run
from training_worlds import Brightness

LORA = LoraSettings(rank=2, alpha=4)


def state_of(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "state.safetensors")


def began() -> dict[str, Tensor]:
    return Policy.of(families.mmdit(), LORA).tensors()


def gradient_norm(state: dict[str, Tensor]) -> float:
    """Of AdamW's first step, whose first moment is a tenth of the gradient."""
    moments = [t for name, t in under("optimiser", state).items() if name.endswith(".exp_avg")]
    return 10 * math.sqrt(sum(float(t.square().sum()) for t in moments))


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(tmp_path):
    whole = run(Draft(), tmp_path / "whole", updates=1, clip_norm=None).record.history[0]["gradient_norm"]
    assert gradient_norm(state_of(tmp_path / "whole")) == pytest.approx(whole, rel=1e-4)
    found = run(Draft(), tmp_path / "clipped", updates=1, clip_norm=whole / 2)
    assert found.record.history[0]["gradient_norm"] == pytest.approx(whole, rel=1e-4)
    # torch divides by the norm + 1e-6
    assert gradient_norm(state_of(tmp_path / "clipped")) == pytest.approx(whole / 2 * whole / (whole + 1e-6), rel=1e-4)


def test_weights_decay_by_the_rate_times_the_decay(tmp_path):
    first, rate, decay = began(), 1e-2, 0.5
    for name, weight_decay in (("plain", 0.0), ("decayed", decay)):
        run(Draft(), tmp_path / name, updates=1, learning_rate=rate, weight_decay=weight_decay)
    plain, decayed = (under("policy", state_of(tmp_path / name)) for name in ("plain", "decayed"))
    for name, start in first.items():
        torch.testing.assert_close(plain[name] - decayed[name], rate * decay * start, rtol=1e-3, atol=1e-7)
    assert any(bool(start.any()) for start in first.values())


def test_the_averages_follow_closely_at_first_and_as_they_are_asked_to_later(tmp_path):
    """``min(ema_decay, (1 + k) / (10 + k))`` of themselves after update ``k``: 0.1, 2/11, then at most 0.2."""
    average = began()
    for updates, keep in ((1, 1 / 10), (2, 2 / 11), (3, 0.2)):
        run(Draft(), tmp_path, updates=updates, ema_decay=0.2)
        state = state_of(tmp_path)
        policy, found = under("policy", state), under("average", state)
        for name, number in average.items():
            average[name] = keep * number + (1 - keep) * policy[name]
            torch.testing.assert_close(found[name], average[name], rtol=1e-5, atol=1e-8)


def test_a_collection_is_learnt_from_as_often_as_asked_for(tmp_path):
    run(Draft(), tmp_path / "three", updates=2, inner_updates=3)
    steps = {int(t) for name, t in under("optimiser", state_of(tmp_path / "three")).items() if name.endswith(".step")}
    assert steps == {6}


@attrs.frozen
class Noted(Draft):
    """Which prompts an update draws."""

    drawn: list[tuple[int, ...]] = attrs.field(factory=list, eq=False)

    def collect(self, problem, update):
        self.drawn.append(update.prompts)
        return super().collect(problem, update)


def test_every_prompt_is_drawn_once_before_any_is_drawn_again(tmp_path):
    method = Noted()
    core.train(
        method, families.mmdit(), Brightness(), PROMPTS, out=tmp_path, reward=families.clip(), steps=4, progress=False,
        training=TrainSettings(updates=6, prompts_per_update=2, lora=LORA, tracker=None),
    )  # fmt: skip
    order = [prompt for update in method.drawn for prompt in update]
    epochs = [order[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


class SteepLater(Brightness):
    """Finite everywhere; from the third update on with a slope that is not."""

    calls = 0

    def __call__(self, *arguments: Any) -> Tensor:
        type(self).calls += torch.is_grad_enabled()
        value = super().__call__(*arguments)
        return value if type(self).calls < 3 else value.detach() + (value - value.detach()).sqrt()


def test_a_gradient_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(core.NonFiniteError, match="the norm of the gradient is nan at update 2; .* after update 2, is"):
        run(Draft(), tmp_path, value=SteepLater())
    kept = state_of(tmp_path)
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert {int(t) for name, t in under("optimiser", kept).items() if name.endswith(".step")} == {2}


def test_the_old_policy_is_told_of_every_update(tmp_path):
    """With no memory of its own it is the policy."""
    run(DiffusionNft(samples_per_prompt=2, old_decay=0.0), tmp_path, updates=2)
    state = state_of(tmp_path)
    assert_equal(under("old", state), under("policy", state))
    assert any(not torch.equal(tensor, began()[name]) for name, tensor in under("old", state).items())


@pytest.mark.parametrize("method", [Draft(), DiffusionNft(samples_per_prompt=2)])
def test_what_is_evaluated_is_what_is_saved(method, tmp_path):
    """The saved LoRA over the backbone, sampled from the run's noise and rated anew; the frozen one differs."""
    record = run(method, tmp_path, updates=6).record
    backbone, reward, asked = families.mmdit(), families.clip(), PROMPTS[:2]
    side = backbone.native_resolution // backbone.latent_factor
    sigmas, shape = backbone.sigmas(4, (side, side)), (backbone.latent_channels, side, side)
    noise = initial_noise(0, range(2), 1, shape).flatten(0, 1)

    def scores(network: core.Backbone) -> Tensor:
        denoiser = core.Denoiser(network, network.encode_prompts(asked), network.null_condition(), 1.0)
        with torch.no_grad():
            images = network.decode_latents(core.sample(denoiser, noise, sigmas)).clamp(0, 1)
            return reward.rate(images, reward.encode_prompts(asked))

    first, last = (torch.tensor(next(iter(record.evaluations[n]["scores"].values()))) for n in (0, -1))
    torch.testing.assert_close(scores(backbone), first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores(core.with_lora(backbone, tmp_path)), last, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, last, rtol=1e-3)


def test_the_best_weights_are_never_ahead_of_the_checkpoint(tmp_path, monkeypatch):
    """Killed after the best evaluation and gone on with where that is not evaluated, the record and ``best`` agree."""
    from stitchvm.core.training.evaluation import Gallery
    from stitchvm.core.training.state import TrainingState

    judge, numbers = Gallery.judge, iter((0.1, 0.2, 0.4, 0.3))

    def told(self, problem, drawn, before):
        found = judge(self, problem, drawn, before)
        return attrs.evolve(found, scores={name: torch.full((2,), next(numbers)) for name in found.scores})

    monkeypatch.setattr(Gallery, "judge", told)
    save = TrainingState.save

    def killed(self, record, write):
        save(self, record, write)
        if record.updates == record.evaluations[-1]["update"] == 2:
            raise KeyboardInterrupt

    common: dict[str, Any] = {"lora": LORA, "prompts_per_update": 2, "checkpoint_every": 5, "tracker": None}

    def go(updates: int, every: int) -> core.TrainResult:
        plan = TrainSettings(updates=updates, evaluate_every=every, learning_rate=1e-2, **common)
        return core.train(
            Draft(), families.mmdit(), Brightness(), PROMPTS, out=tmp_path, training=plan, reward=families.clip(),
            steps=4, evaluation_prompts=PROMPTS[:2], progress=False,
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(TrainingState, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            go(6, 1)
    average = under("average", state_of(tmp_path))
    record = go(4, 4).record
    assert record.best["update"] == 2 == json.loads((tmp_path / "train.json").read_text())["best_update"]
    best = read_tensors(tmp_path / "best" / "pytorch_lora_weights.safetensors")
    assert_equal(best, {f"transformer.{n.replace('.default', '')}": tensor for n, tensor in average.items()})


def attached() -> tuple[core.Backbone, core.StitchedValue]:
    """A backbone with random weights and a value model on its blocks 1 and 2, with its reward."""
    backbone, bare, *_ = family("mmdit")
    reward = LinearReward(side=4)
    name = name_of(reward)
    return backbone, core.StitchedValue(bare.head, {name: bare.branches[0]}, bare.null, rewards={name: reward})


def test_over_a_policys_blocks_a_value_reads_its_adapter_and_has_a_gradient_in_it():
    backbone, value = attached()
    policy = moved(Policy.of(backbone, LORA), 0.2)
    latents = torch.randn(2, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    before, over = value(latents, 0.5), value.over(policy.backbone)
    found = over(latents, 0.5)
    assert not torch.allclose(found, before, rtol=1e-2) and torch.equal(value(latents, 0.5), before)
    x = backbone.noisy(latents, 0.5)
    expected = core.Head(policy.backbone, 2)(x, value.null.expand(2))
    torch.testing.assert_close(over.features(latents, 0.5), expected)
    assert all(p.requires_grad for p in policy.parameters.values())
    reached = torch.autograd.grad(found.sum(), list(policy.parameters.values()), allow_unused=True)
    assert any(gradient is not None and bool(gradient.any()) for gradient in reached)


def test_a_head_sees_the_adapter_only_when_asked(tmp_path):
    backbone, value = attached()

    def go(name: str, **settings: Any) -> dict[str, Any]:
        plan = {"updates": 3, "lora": {"rank": 2, "alpha": 4}, "learning_rate": 1e-2, "tracker": None, **settings}
        found = core.train(
            Draft(stop=(2, 2)), backbone, value, PROMPTS, out=tmp_path / name, training=plan, steps=4,
            resolution=(16, 16), progress=False,
        )  # fmt: skip
        return {"values": [entry["value"] for entry in found.record.history], **found.record.settings["training"]}

    plain, asked, frozen = go("plain"), go("asked", head="policy"), go("frozen", head="frozen")
    assert plain == frozen and "head" not in plain and asked["head"] == "policy"
    assert asked["values"][0] == pytest.approx(plain["values"][0], rel=1e-5)  # a LoRA begins as nothing
    assert asked["values"][2] != pytest.approx(plain["values"][2], rel=1e-4)
    with pytest.raises(core.ConfigError, match="head is 'policy', which is for stitched values"):
        run(Draft(), tmp_path / "other", head="policy")
