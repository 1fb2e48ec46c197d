"""The trainer: resuming after SIGKILL, several processes, evaluation of held-out rewards, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

import families
import killing
from stitchvm import core
from stitchvm.core import LoraSettings, Prediction, Prompted, TrainSettings
from stitchvm.core.files import read_tensors
from stitchvm.core.training.evaluation import Gallery, _fallen
from stitchvm.core.training.state import TrainingState
from stitchvm.plugins.aligners.best_of_n import BestOfN
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo
from training_worlds import Brightness

METHODS = {
    "draft": Draft(), "nft": DiffusionNft(samples_per_prompt=2, stop=(2, 3)), "grpo": FlowGrpo(samples_per_prompt=2),
    "dpo": DiffusionDpo(samples_per_prompt=2, stop=(2, 3)),
}  # fmt: skip
PROMPTS = ["a red ball", "a blue box", "a green cone"]


def run(
    method: object, out: Path, updates: int = 4, value: object = None, prompts_per_update: int = 2, **settings: object
) -> core.TrainResult:
    plan = TrainSettings(
        updates=updates, prompts_per_update=prompts_per_update, evaluate_every=2, checkpoint_every=1,
        **{"learning_rate": 1e-2, "lora": LoraSettings(rank=2, alpha=4), "tracker": None, **settings},
    )  # fmt: skip
    return core.train(
        method, families.mmdit(), value or Brightness(), PROMPTS, out=out, training=plan, reward=families.clip(),
        steps=4, evaluation_prompts=PROMPTS[:2], progress=False,
    )  # fmt: skip


def lora_of(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "pytorch_lora_weights.safetensors")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", METHODS)
def test_training_raises_the_value_and_says_what_it_cost(name, tmp_path):
    result = run(METHODS[name], tmp_path, updates=12)
    values = [entry["value"] for entry in result.record.history]
    assert sum(values[-3:]) > sum(values[:3])
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["updates"] == 12 and report["seed"] == 0 and report["versions"]["torch"]
    assert report["cost"]["denoiser"] > report["cost"]["denoiser_backward"] > 0
    assert [entry["update"] for entry in report["evaluations"]] == [0, 2, 4, 6, 8, 10, 12]
    assert (tmp_path / "training.png").exists() and (tmp_path / "grids" / "00012.png").exists()
    saved = {f"transformer.{n.replace('.default', '')}": p for n, p in result.policy.parameters.items()}
    assert_equal(lora_of(tmp_path), {name: p.detach() for name, p in saved.items()})


def test_drafts_passes_are_those_that_it_says(tmp_path):
    """Two prompts, four steps, the last with gradient and once more by the frozen backbone: 8 + 2, of which 2."""
    result = run(Draft(), tmp_path, updates=3)
    passes = result.record.passes
    assert (passes["denoiser"], passes["denoiser_backward"]) == (3 * 10, 3 * 2)


def test_a_tracker_gets_every_updates_figures_and_every_evaluation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(Draft(), tmp_path, updates=3, tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "stitchvm"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    name = next(tag for tag in events.Tags()["scalars"] if tag.startswith("evaluation/"))
    assert [event.step for event in events.Scalars(name)] == [0, 2, 3]


@pytest.mark.parametrize("name", METHODS)
def test_the_batch_changes_nothing_but_memory(name, tmp_path):
    for batch in (64, 1, 3):
        run(METHODS[name], tmp_path / str(batch), updates=2, batch=batch)
    whole = lora_of(tmp_path / "64")
    for batch in (1, 3):
        for key, tensor in lora_of(tmp_path / str(batch)).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=2e-4)


def test_checkpointing_gradients_changes_no_weight_and_bfloat16_runs(tmp_path):
    method = Draft(backward_steps=2)
    run(method, tmp_path / "plain", updates=2)
    run(method, tmp_path / "again", updates=2, gradient_checkpointing=True)
    plain, again = lora_of(tmp_path / "plain"), lora_of(tmp_path / "again")
    for key, tensor in plain.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-4, atol=1e-6)
    rough = run(method, tmp_path / "rough", updates=2, mixed_precision="bf16")
    values = [entry["value"] for entry in rough.record.history]
    exact = [json.loads((tmp_path / "plain" / "train.json").read_text())["history"][k]["value"] for k in range(2)]
    assert values == pytest.approx(exact, abs=0.02) and values != exact
    assert {tensor.dtype for tensor in lora_of(tmp_path / "rough").values()} == {torch.float32}


def test_a_run_goes_on_with_more_updates_and_refuses_other_settings(tmp_path):
    run(Draft(), tmp_path / "parts", updates=2)
    run(Draft(), tmp_path / "parts", updates=4)
    run(Draft(), tmp_path / "whole", updates=4)
    assert_equal(lora_of(tmp_path / "parts"), lora_of(tmp_path / "whole"))
    after = run(Draft(), tmp_path / "parts", updates=5, gradient_checkpointing=True)  # as after a lack of memory
    assert after.record.updates == 5
    with pytest.raises(core.ConfigError, match="method_settings.backward_steps was 1, now 2"):
        run(Draft(backward_steps=2), tmp_path / "whole")


def to_be_killed(folder: Path, name: str) -> None:
    run(METHODS[name], folder, updates=11)


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_five_random_moments_and_resumed_ends_in_the_same_weights(name, tmp_path):
    whole, killed = killing.whole_and_killed(
        "test_training", "to_be_killed", tmp_path, name, state="state.safetensors",
        final="pytorch_lora_weights.safetensors", within=0.2,
    )  # fmt: skip
    assert_equal(lora_of(killed), lora_of(whole))
    assert_equal(read_tensors(killed / "state.safetensors"), read_tensors(whole / "state.safetensors"))


def test_more_processes_than_prompts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    with pytest.raises(core.ConfigError, match="prompts_per_update is 3, which 2 processes cannot share"):
        run(Draft(), tmp_path, prompts_per_update=3)


class BreaksLater:
    """Not a number from the second update on; says so by counting its calls with gradient."""

    calls = 0

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        type(self).calls += torch.is_grad_enabled()
        return latents.flatten(1).mean(1) * (math.nan if type(self).calls > 2 else 1.0)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(core.NonFiniteError, match="the loss is nan at update 2; lower the learning rate"):
        run(Draft(), tmp_path, value=BreaksLater())
    kept = read_tensors(tmp_path / "state.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def evaluated(update: int, scores: dict[str, list[float]]) -> dict[str, object]:
    means = {name: {"mean": sum(each) / len(each)} for name, each in scores.items()}
    return {"update": update, "scores": scores, "rewards": means}


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_named():
    first = {"trained": [0.0, 0.1, 0.2, 0.3], "same": [0.5, 0.5, 0.4, 0.6], "worse": [0.9, 0.8, 0.7, 0.9]}
    up = {name: torch.tensor(scores) for name, scores in first.items()}
    up |= {"trained": up["trained"] + torch.tensor([0.3, 0.2, 0.3, 0.4]),
           "worse": up["worse"] - torch.tensor([0.2, 0.1, 0.2, 0.3]),
           "same": up["same"] + torch.tensor([0.1, -0.1, 0.05, -0.1])}  # fmt: skip
    before = [evaluated(0, first)]
    with pytest.warns(RuntimeWarning, match="worse, held out, fell while"):
        assert _fallen(up, before) == ["worse"]
    assert _fallen({**up, "trained": torch.tensor(first["trained"])}, before) == []


def test_a_trained_reward_that_falls_from_its_best_is_named():
    """Beside the best evaluation, not the first: below that by 0.1 on each of four prompts, give or take 0.01."""
    first, best, later = (evaluated(n, {"trained": [0.1 + n, 0.2 + n, 0.3 + n, 0.4 + n]}) for n in (0, 2, 1))
    little, much = (torch.tensor(best["scores"]["trained"]) - fall + torch.tensor([0.01, -0.01, 0.01, -0.01])
                    for fall in (0.005, 0.1))  # fmt: skip
    assert _fallen({"trained": little}, [first, best, later]) == []
    with pytest.warns(RuntimeWarning, match="trained, fell from what it was after update 2"):
        assert _fallen({"trained": much}, [first, best, later]) == ["trained"]


def test_the_weights_of_the_best_evaluation_are_kept(tmp_path, monkeypatch):
    judge, sampled = Gallery.judge, []

    def told(self, problem, drawn, before):
        found = judge(self, problem, drawn, before)
        trained, *others = found.scores
        sampled.append(averages[0].tensors())
        mean = (0.1, 0.4, 0.2, 0.4)[len(sampled) - 1]
        return attrs.evolve(found, scores={trained: torch.full((2,), mean), **{n: found.scores[n] for n in others}})

    averages, begin = [], TrainingState.begin.__func__

    def begun(cls, *arguments):
        state = begin(cls, *arguments)
        averages.append(state.averages)
        return state

    monkeypatch.setattr(Gallery, "judge", told)
    monkeypatch.setattr(TrainingState, "begin", classmethod(begun))
    with pytest.warns(RuntimeWarning, match="trained, fell from what it was after update"):
        run(Draft(), tmp_path, updates=6)
    assert json.loads((tmp_path / "train.json").read_text())["best_update"] == 2
    kept, last = lora_of(tmp_path / "best"), lora_of(tmp_path)
    assert_equal(kept, {f"transformer.{n.replace('.default', '')}": tensor for n, tensor in sampled[1].items()})
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert not (tmp_path / "best.partial").exists()


def test_held_out_rewards_are_evaluated_and_never_trained_on(tmp_path):
    lora = LoraSettings(rank=2, alpha=4)
    plan = TrainSettings(updates=2, prompts_per_update=2, evaluate_every=1, lora=lora, tracker=None)
    reward, other = families.clip(), families.clip(seed=5)
    reward.record, other.record = (
        core.RewardRecord(name=name, family="clip", path="/nowhere") for name in ("mine", "other")
    )
    common = {"training": plan, "reward": reward, "steps": 3, "progress": False}
    found = core.train("draft", families.mmdit(), None, PROMPTS, out=tmp_path / "a", held_out_rewards=[other], **common)
    assert [list(entry["rewards"]) for entry in found.record.evaluations] == [["mine", "other"]] * 3
    seen = []

    def judge(images: Tensor, prompts: list[str]) -> list[bool]:
        seen.append((tuple(images.shape), prompts))
        return [True, False, True]

    judged = core.train(
        "draft", families.mmdit(), None, PROMPTS, out=tmp_path / "b", judges={"detector": judge}, **common
    )
    assert seen == [((3, 3, 16, 16), PROMPTS)] * 3
    assert judged.record.evaluations[-1]["rewards"]["detector"]["mean"] == pytest.approx(2 / 3)
    assert_equal(lora_of(tmp_path / "a"), lora_of(tmp_path / "b"))


class Unfinished:
    """A training method in the making."""

    def collect(self) -> None: ...


@pytest.mark.parametrize(("method", "settings", "said"), [
    (Unfinished(), {}, "Unfinished lacks needs_old, samples_per_prompt, check, loss, updated of a training method"),
    (BestOfN(), {}, "BestOfN steers samples and trains nothing; use align"),
    ("draft", {"backward_step": 2}, "unknown key 'backward_step', did you mean 'backward_steps'"),
    ("draft", {"renoised": 2, "backward_steps": 3}, "set backward_steps to 1"),
    ("diffusion-nft", {"samples_per_prompt": 1}, "samples_per_prompt"),
])  # fmt: skip
def test_what_a_training_refuses(method, settings, said, tmp_path):
    with pytest.raises(core.ConfigError, match=said):
        core.train(method, families.mmdit(), None, PROMPTS, out=tmp_path, reward=families.clip(), **settings)


@pytest.mark.parametrize(("tracker", "said"), [
    ("nothing-like-it", "tracker is 'nothing-like-it'"), ("aim", "the tracker 'aim' is not installed"),
])  # fmt: skip
def test_a_tracker_that_is_not_there_is_an_error(tracker, said, tmp_path):
    with pytest.raises(core.ConfigError, match=said):
        run(Draft(), tmp_path, tracker=tracker)


def test_align_refuses_a_method_that_trains():
    with pytest.raises(core.ConfigError, match="trains weights and steers nothing; use train"):
        core.align("draft", families.mmdit(), None, PROMPTS, reward=families.clip())


def test_an_unwritable_folder_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(core.OutputError, match="cannot write"):
        run(Draft(), tmp_path / "file")
