"""What becomes of a training whose judges fail, give no number, or see samples that have diverged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import families
from stitchvm import core
from stitchvm.core import ConfigError, JointReward, LoraSettings, NonFiniteError, RewardRecord, TrainSettings
from stitchvm.core.checkpoints import under
from stitchvm.core.cli.training import _mean
from stitchvm.core.costs import CostMeter
from stitchvm.core.files import read_tensors
from stitchvm.core.reproduction.training_tables import _entry, _gain
from stitchvm.core.training.evaluation import Gallery, _fallen
from stitchvm.plugins.aligners.draft import Draft
from test_training import PROMPTS, assert_equal, lora_of
from training_worlds import Brightness, problem

Judge = Callable[[Tensor, list[str]], Tensor]
BRIGHT: dict[str, Judge] = {"bright": lambda images, prompts: images.mean((1, 2, 3))}


def train(out: Path, updates: int = 4, value: Any = None, **settings: Any) -> core.TrainResult:
    plan = {"updates": updates, "prompts_per_update": 2, "evaluate_every": 2, "checkpoint_every": 100,
            "lora": LoraSettings(rank=2, alpha=4), "tracker": None, "learning_rate": 1e-2,
            **settings.pop("training", {})}  # fmt: skip
    given = {"method": Draft(), "backbone": families.mmdit(), "value": value or Brightness(), "prompts": PROMPTS,
             "reward": families.clip(), "steps": 3, "progress": False, **settings}  # fmt: skip
    return core.train(**given, out=out, training=TrainSettings(**plan))


def report_of(folder: Path) -> dict[str, Any]:
    """``train.json``, which may hold no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return dict(json.loads((folder / "train.json").read_text(), parse_constant=refuse))


def updates_kept(folder: Path) -> set[int]:
    """How many steps the checkpoint's optimiser has taken."""
    moments = under("optimiser", read_tensors(folder / "state.safetensors"))
    return {int(tensor) for name, tensor in moments.items() if name.endswith(".step")}


def named(name: str, seed: int = 0) -> Any:
    reward = families.clip(seed=seed)
    reward.record = RewardRecord(name=name, family="clip", path="/nowhere")
    return reward


def test_a_score_that_is_no_number_is_left_out_and_told_of(tmp_path):
    calls = []

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(images))
        score = BRIGHT["bright"](images, prompts)
        return torch.where(torch.tensor([False, len(calls) == 2, len(calls) == 2]), torch.nan, score)

    with pytest.warns(RuntimeWarning, match="flaky gave no finite score for 2 of 3 samples after update 2; they are"):
        record = train(tmp_path, judges={"flaky": judge, **BRIGHT}).record
    first, second, third = report_of(tmp_path)["evaluations"]
    assert second["scores"]["flaky"] == [second["scores"]["bright"][0], None, None]
    assert second["rewards"]["flaky"] == {"mean": second["scores"]["bright"][0], "stderr": None}
    for whole in (first, third):
        assert whole["scores"]["flaky"] == whole["scores"]["bright"] and whole["rewards"]["flaky"]["stderr"] > 0
    assert record.updates == 4 and (tmp_path / "training.png").exists()


def test_a_judge_without_any_number_ends_no_training_and_is_drawn_and_told_as_such(tmp_path):
    lost: dict[str, Judge] = {"lost": lambda images, prompts: torch.full((len(images),), torch.inf)}
    with pytest.warns(RuntimeWarning, match="lost gave no finite score for 3 of 3 samples"):
        record = train(tmp_path, judges=lost).record
    assert [entry["rewards"]["lost"] for entry in record.evaluations] == [{"mean": None, "stderr": None}] * 3
    assert (tmp_path / "training.png").exists()
    assert _mean(record.evaluations[0], "rewards", "lost") == "no finite score"
    run = {**report_of(tmp_path), "seed": 0}
    row = _entry("a", core_row(), [run])
    assert row["after"]["lost"] == {"mean": None, "stderr": None} and row["after"]["ClipReward"]["mean"]


def core_row() -> Any:
    from stitchvm.core.reproduction.training_rows import TrainingRow

    return TrainingRow(name="draft", label="DRaFT", method="draft")


def test_a_judge_that_fails_costs_no_update(tmp_path):
    """Gone on with once it works, the run ends as one in which it always did, and has the same evaluations."""

    def fails(images: Tensor, prompts: list[str]) -> Tensor:
        if (tmp_path / "parts" / "grids" / "00000.png").exists():
            raise ValueError("a detector's own error")
        return BRIGHT["bright"](images, prompts)

    with pytest.raises(ValueError, match="a detector's own error"):
        train(tmp_path / "parts", judges={"bright": fails})
    assert updates_kept(tmp_path / "parts") == {2}
    parts = train(tmp_path / "parts", judges=BRIGHT).record
    whole = train(tmp_path / "whole", judges=BRIGHT).record
    assert_equal(lora_of(tmp_path / "parts"), lora_of(tmp_path / "whole"))
    assert_equal(lora_of(tmp_path / "parts" / "best"), lora_of(tmp_path / "whole" / "best"))
    told = [[(entry["update"], entry["scores"]) for entry in record.evaluations] for record in (parts, whole)]
    assert told[0] == told[1] and [update for update, _ in told[0]] == [0, 2, 4]


def test_a_finished_run_is_not_evaluated_again_when_it_goes_on(tmp_path):
    """Even where its last evaluation was not its best."""
    seen, reward = [], named("mine")

    def falls(images: Tensor, condition: core.Condition) -> Tensor:
        seen.append(len(images))
        return torch.full((len(images),), -float(len(seen)))

    reward.rate = falls
    for updates in (2, 2, 3):
        record = train(tmp_path, updates=updates, reward=reward).record
    assert [entry["update"] for entry in record.evaluations] == [0, 2, 3] and len(seen) == 3
    assert record.best["update"] == 0


def test_a_trained_reward_without_any_number_ends_the_training_by_its_name(tmp_path):
    """Before the checkpoint is written: these weights are none to go on from."""
    reward, rate = named("mine"), families.clip().rate
    before: list[bool] = []

    def later(images: Tensor, condition: core.Condition) -> Tensor:
        before.append(True)
        return rate(images, condition) * (1.0 if len(before) == 1 else math.nan)

    reward.rate = later
    with pytest.raises(NonFiniteError, match="mine, trained, scored no sample after update 2 .*lower the learning rate"
                       ".*after update 1, is kept: a rerun goes on from it"):  # fmt: skip
        train(tmp_path, reward=reward, training={"checkpoint_every": 1})
    assert updates_kept(tmp_path) == {1}
    before.append(True)
    with pytest.raises(NonFiniteError, match="no sample after update 0 .*nothing is trained yet, so check the backb"):
        train(tmp_path / "new", reward=reward)


def test_samples_that_diverge_in_an_evaluation_are_the_learning_rates_fault(tmp_path):
    """Its weights are finite, and what they sample is not: the checkpoint before it stays, where there is one."""
    wild = {"learning_rate": 1e25, "evaluate_every": 1}
    with pytest.raises(NonFiniteError, match="samples after update 1 left the finite .*diverged: lower the learning"
                       ) as found:  # fmt: skip
        train(tmp_path / "new", training=wild)
    assert "checkpoint" not in str(found.value) and not (tmp_path / "new" / "state.safetensors").exists()
    train(tmp_path / "old", updates=2)
    with (
        pytest.warns(RuntimeWarning, match="learning_rate was 0.01, now 1e\\+25, for all updates after 2"),
        pytest.raises(NonFiniteError, match="samples after update 3 .*The last checkpoint, after update 2, is kept"),
    ):
        train(tmp_path / "old", training=wild)
    assert updates_kept(tmp_path / "old") == {2}


def test_the_parts_of_a_trained_sum_are_evaluated_by_themselves_in_no_further_pass(tmp_path):
    parts = {"one": families.clip(seed=1), "two": families.clip(seed=2)}
    joint = JointReward(parts, [1.0, 0.5])
    record = train(tmp_path, updates=2, reward=joint).record
    for entry in record.evaluations:
        assert list(entry["rewards"]) == ["one + 0.5 two"] and list(entry["parts"]) == ["one", "two"]
        means = {name: found["mean"] for name, found in entry["parts"].items()}
        assert entry["rewards"]["one + 0.5 two"]["mean"] == pytest.approx(means["one"] + 0.5 * means["two"], rel=1e-5)
        assert means["one"] != pytest.approx(means["two"], rel=1e-3)
    assert (tmp_path / "training.png").exists() and _mean(entry, "parts", "one")
    small = problem()
    gallery = Gallery.of(small, PROMPTS[:2], [joint])
    with CostMeter() as cost:
        drawn = gallery.draw(small, small.reference, 0)
    assert cost.passes["reward"] == 2 * 2, "two rewards of two pictures"
    expected = joint.rate(drawn.images, joint.condition(PROMPTS[:2]))
    torch.testing.assert_close(drawn.trained, expected)
    alone = parts["two"].rate(drawn.images, parts["two"].condition(PROMPTS[:2]))
    torch.testing.assert_close(drawn.parts["two"], alone)


@pytest.mark.parametrize("held_out", [
    lambda one: [one], lambda one: [JointReward([one, named("three", 3)])],
])  # fmt: skip
def test_what_is_trained_on_in_a_sum_is_not_held_out(held_out, tmp_path):
    one, two = named("one", 1), named("two", 2)
    with pytest.raises(ConfigError, match="held_out_rewards has one.*, but one is trained on \\(one \\+ two\\)"):
        train(tmp_path, reward=JointReward([one, two]), held_out_rewards=held_out(one))
    assert not (tmp_path / "state.safetensors").exists()


def evaluated(update: int, scores: dict[str, list[float | None]]) -> dict[str, Any]:
    known = {name: [score for score in each if score is not None] for name, each in scores.items()}
    return {"update": update, "scores": scores,
            "rewards": {name: {"mean": sum(each) / len(each)} for name, each in known.items()}}  # fmt: skip


def test_a_fall_is_told_by_the_prompts_that_have_both_scores():
    first = evaluated(0, {"trained": [0.0, 0.1, 0.2, 0.3], "other": [0.9, None, 0.7, 0.9]})
    now = {"trained": torch.tensor([0.3, 0.3, 0.5, 0.7]), "other": torch.tensor([0.5, 0.1, 0.35, torch.nan])}
    with pytest.warns(RuntimeWarning, match="other, held out, fell"):
        assert _fallen(now, [first]) == ["other"]
    assert _fallen({**now, "other": torch.tensor([0.5, 0.1, torch.nan, torch.nan])}, [first]) == []  # one pair


def test_a_gain_is_over_the_seeds_and_prompts_that_have_both_scores():
    """Three prompts, two seeds: 0.1 and 0.3 on the first, 0.4 by its second seed alone, none on the third."""

    def runs(*each: list[float | None]) -> dict[int, dict[str, Any]]:
        return {seed: {"evaluations": [{"seconds": 1, "scores": {"r": scores}}]} for seed, scores in enumerate(each)}

    found = _gain(runs([1.1, None, 2.0], [1.3, 2.4, None]), runs([1.0, 2.0, None], [1.0, 2.0, 3.0]))["r"]
    assert found["mean"] == pytest.approx((0.2 + 0.4) / 2) and found["stderr"] == pytest.approx(0.1)
    assert _gain(runs([None]), runs([1.0]))["r"] == {"mean": None, "stderr": None}


@attrs.frozen(eq=False)
class Steep(Brightness):
    """Finite itself; its gradient's squares are not."""

    def __call__(self, *arguments: Any) -> Tensor:
        return super().__call__(*arguments) * 1e30


def test_a_gradient_whose_norm_overflows_stops_the_run_at_once(tmp_path):
    with pytest.raises(NonFiniteError, match="the norm of the gradient is inf at update 0; lower the learning rate."
                       ) as found:  # fmt: skip
        train(tmp_path, value=Steep())
    assert "checkpoint" not in str(found.value)


@attrs.frozen
class Silent(Draft):
    """Has a figure that is no number."""

    def loss(self, *arguments: Any) -> tuple[Tensor, dict[str, float]]:
        losses, figures = super().loss(*arguments)
        return losses, {**figures, "silent": math.nan}


def test_a_figure_that_is_no_number_is_none_in_the_record(tmp_path):
    train(tmp_path, updates=2, method=Silent())
    history = report_of(tmp_path)["history"]
    assert [entry["silent"] for entry in history] == [None, None] and history[0]["value"] != 0


def test_a_weight_that_overflows_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="a weight is not finite after update 0; lower the learning rate."):
        train(tmp_path, training={"learning_rate": 1e37, "weight_decay": 1e3})
