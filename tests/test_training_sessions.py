"""Sessions of one training: how a process was launched, what may change when a run goes on, and what it has cost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import families
from stitchvm import core
from stitchvm.core import ArtefactError, ConfigError, TrainSettings, loading, processes
from stitchvm.core.checkpoints import under
from stitchvm.core.costs import CostMeter
from stitchvm.core.devices import VARIABLE
from stitchvm.core.files import read_tensors, write_tensors
from stitchvm.core.processes import join_group
from stitchvm.core.training import run as training
from stitchvm.plugins.aligners.draft import Draft
from test_training import PROMPTS, assert_equal, lora_of, run
from training_worlds import Brightness

LAUNCHED = "ACCELERATE_MIXED_PRECISION"


def values_of(result: core.TrainResult) -> list[float]:
    return [entry["value"] for entry in result.record.history]


# -- How it was launched -----------------------------------------------------------------------------------------------


def test_the_launchers_precision_is_what_a_training_runs_in_unless_it_says_otherwise(tmp_path, monkeypatch):
    """And what ran is in the record."""

    def go(name: str, **settings: Any) -> core.TrainResult:
        return run(Draft(), tmp_path / name, updates=2, **settings)

    exact, rough = go("exact"), go("rough", mixed_precision="bf16")
    monkeypatch.setenv(LAUNCHED, "bf16")
    launched, against = go("launched"), go("against", mixed_precision="no")
    assert values_of(launched) == values_of(rough) != values_of(exact) == values_of(against)
    told = [each.record.settings["training"]["mixed_precision"] for each in (exact, rough, launched, against)]
    assert told == ["no", "bf16", "bf16", "no"]
    with pytest.raises(ConfigError, match="mixed_precision was 'no', now 'bf16'"):
        run(Draft(), tmp_path / "exact", updates=4)


def test_a_run_whose_precision_was_no_by_default_goes_on(tmp_path):
    run(Draft(), tmp_path, updates=2, mixed_precision="no")
    assert run(Draft(), tmp_path, updates=3).record.updates == 3


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_launchers_precision_that_it_cannot_run_in_is_refused(precision, tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHED, precision)
    with pytest.raises(ConfigError, match=f"mixed_precision '{precision}', which a training cannot .* bf16, or set"):
        run(Draft(), tmp_path, updates=1)


def test_what_accelerate_refuses_is_not_the_trackers_fault(tmp_path, monkeypatch):
    def refuses(**settings: Any) -> None:
        raise ValueError("bf16 needs another device")

    monkeypatch.setattr(processes, "Accelerator", refuses)
    with pytest.raises(ConfigError, match="accelerate refuses to start this process \\(bf16 needs another") as found:
        run(Draft(), tmp_path, updates=1, tracker="tensorboard")
    assert "tracker" not in str(found.value)


def group(device: str, number: int = 1, of: int = 2) -> tuple[Any, dict[str, Any]]:
    """An Accelerator of a process of a group, and what it was called with."""
    called: dict[str, Any] = {}

    def make(**settings: Any) -> Any:
        called.update(settings)
        return SimpleNamespace(device=torch.device(device), num_processes=of, process_index=number)

    return make, called


@pytest.mark.parametrize(("network", "own", "of", "fits"), [
    ("cuda:0", "cuda:1", 2, False), ("cuda:1", "cuda:1", 2, True), ("cuda:1", "cpu", 2, False), ("cpu", "cpu", 2, True),
    ("cuda:1", "cuda", 1, True), ("cuda:1", "cuda:0", 1, True), ("cpu", "cpu", 1, True),
])  # fmt: skip
def test_a_network_on_another_device_than_its_process_works_on_is_refused(network, own, of, fits, monkeypatch):
    make, called = group(own, of=of)
    monkeypatch.setattr(processes, "Accelerator", make)
    if fits:
        assert join_group(torch.device(network)).device == torch.device(own)
    else:
        with pytest.raises(ConfigError, match=f"the network is on {network}, but process 1 of 2 works on {own}. Load"):
            join_group(torch.device(network))
    assert called["cpu"] == (network == "cpu")


class Enough(Exception):
    """All was seen."""


def test_a_name_is_loaded_where_its_process_works(tmp_path, monkeypatch):
    """As the second process of ``accelerate launch --multi_gpu``: the backbone by the process's GPU, the rewards by
    the backbone's, and Accelerate not told to stay on the CPU."""
    seen: dict[str, torch.device] = {}
    gpu = torch.device("cuda", 1)

    class Stub:
        """A family whose networks know where they were asked to be."""

        @classmethod
        def from_pretrained(cls, record: Any, *, device: Any, **options: Any) -> Any:
            seen[record.name] = torch.device(device)
            return (
                families.clip()
                if record.name == "clip-vit-l-14"
                else SimpleNamespace(device=torch.device(device), guided_passes=2)
            )

    def resolved(value: Any, reward: Any, network: Any, seed: int) -> Any:
        core.load_reward(reward, device=network.device)
        training._accelerator(TrainSettings(tracker=None), network, tmp_path)
        raise Enough

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(loading, "family_class", lambda record: Stub)
    monkeypatch.setattr(training, "resolve_value", resolved)
    make, called = group("cuda:1")
    monkeypatch.setattr(processes, "Accelerator", make)
    with pytest.raises(Enough):
        core.train("draft", "sd3.5-medium", None, PROMPTS, out=tmp_path, reward="clip-vit-l-14")
    assert seen == {"sd3.5-medium": gpu, "clip-vit-l-14": gpu} and called["cpu"] is False


def test_a_tracker_gets_the_settings_of_the_run(tmp_path):
    run(Draft(), tmp_path, updates=1, tracker="tensorboard")
    (file,) = (tmp_path / "stitchvm").glob("*/hparams.yml")
    told = yaml.safe_load(file.read_text())
    assert (told["method"], told["training.learning_rate"], told["training.lora.rank"]) == ("Draft", 0.01, 2)
    assert told["latent_shape"] == "[4, 8, 8]" and told["method_settings.stop"] is None
    assert all(entry is None or isinstance(entry, str | int | float) for entry in told.values())


# -- What may change ---------------------------------------------------------------------------------------------------


def policy_of(folder: Path) -> dict[str, torch.Tensor]:
    return under("policy", read_tensors(folder / "state.safetensors"))


def test_the_learning_rate_may_change_when_a_run_goes_on_and_that_is_put_down(tmp_path):
    """AdamW's step is proportional to it."""
    for name in ("same", "slower"):
        run(Draft(), tmp_path / name, updates=2)
    before = policy_of(tmp_path / "same")
    run(Draft(), tmp_path / "same", updates=3)
    with pytest.warns(RuntimeWarning, match="learning_rate was 0.01, now 0.001, for all updates after 2"):
        record = run(Draft(), tmp_path / "slower", updates=3, learning_rate=1e-3).record
    same, slower = policy_of(tmp_path / "same"), policy_of(tmp_path / "slower")
    for name, start in before.items():
        torch.testing.assert_close(slower[name] - start, 0.1 * (same[name] - start), rtol=1e-2, atol=1e-7)
    assert max(float((same[name] - start).abs().max()) for name, start in before.items()) > 1e-4
    assert record.settings["training"]["learning_rate"] == 1e-3
    again = run(Draft(), tmp_path / "slower", updates=4, learning_rate=1e-3).record  # no further change
    report = json.loads((tmp_path / "slower" / "train.json").read_text())
    assert again.changes == report["changes"] == [{"after": 2, "learning_rate": [1e-2, 1e-3]}]
    assert report["settings"]["training"]["learning_rate"] == 1e-3


def test_so_may_the_norm_of_the_gradient_and_the_decay_of_the_averages_and_nothing_else(tmp_path):
    run(Draft(), tmp_path, updates=2)
    with pytest.warns(RuntimeWarning, match="clip_norm was 1.0, now None; ema_decay was 0.9, now 0.0"):
        run(Draft(), tmp_path, updates=3, clip_norm=None, ema_decay=0.0)
    state = read_tensors(tmp_path / "state.safetensors")
    assert_equal(under("average", state), under("policy", state))
    with pytest.raises(ConfigError, match="\\(training.weight_decay was 0.0001, now 0.1\\)"):
        run(Draft(), tmp_path, updates=4, clip_norm=None, ema_decay=0.0, weight_decay=0.1)


def test_nothing_changes_in_a_run_that_has_no_update_left(tmp_path):
    run(Draft(), tmp_path, updates=2)
    with pytest.raises(ConfigError, match="training.learning_rate was 0.01, now 0.001"):
        run(Draft(), tmp_path, updates=2, learning_rate=1e-3)


def test_fewer_updates_than_were_done_are_refused(tmp_path):
    run(Draft(), tmp_path, updates=4)
    kept = lora_of(tmp_path)
    with pytest.raises(ConfigError, match="holds a run of 4 updates, and updates is 2; ask for 4 or more, or choose"):
        run(Draft(), tmp_path, updates=2)
    assert_equal(lora_of(tmp_path), kept)


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another kind", "without its tensors"])
def test_a_damaged_checkpoint_is_one_error_that_says_what_to_do(damage, tmp_path):
    run(Draft(), tmp_path, updates=1)
    path = tmp_path / "state.safetensors"
    if damage == "of another kind":
        write_tensors(path, {"x": torch.ones(1)})
    else:
        path.write_bytes(path.read_bytes()[: {"truncated": 100, "empty": 0, "without its tensors": -8}[damage]])
    with pytest.raises(
        ArtefactError, match="the checkpoint '.*state.safetensors' is damaged .*delete it to train from"
    ):
        run(Draft(), tmp_path, updates=2)


@pytest.mark.parametrize("settings", [{"steps": 2.5}, {"steps": 0}, {"seed": -1}, {"guidance_scale": float("inf")}])
def test_numbers_of_a_training_out_of_range(settings, tmp_path):
    ((name, number),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name} is {number}; give a (whole|finite) number from"):
        core.train(Draft(), families.mmdit(), Brightness(), PROMPTS, out=tmp_path, reward=families.clip(), **settings)


# -- What it has cost --------------------------------------------------------------------------------------------------


class Timed(CostMeter):
    """Every update takes a second and a half."""

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.seconds = 1.5


def test_seconds_are_those_of_the_updates_of_all_sessions(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CostMeter", Timed)
    run(Draft(), tmp_path, updates=2)
    assert json.loads((tmp_path / "train.json").read_text())["cost"]["seconds"] == 3.0
    run(Draft(), tmp_path, updates=5)
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["cost"]["seconds"] == 7.5
    assert [(entry["update"], entry["seconds"]) for entry in report["evaluations"]] == [
        (0, 0.0), (2, 3.0), (4, 6.0), (5, 7.5),
    ]  # fmt: skip
