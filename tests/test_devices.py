"""Where networks are loaded to when nobody says: a GPU where there is one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stitchvm.core import ConfigError, JointReward, load_backbone, load_reward
from stitchvm.core.devices import VARIABLE, default_device


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as torch says so."""
    for name in (VARIABLE, "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return monkeypatch


def test_a_gpu_is_taken_where_there_is_one(gpus):
    assert default_device() == torch.device("cuda", 0)
    gpus.setattr(torch.cuda, "current_device", lambda: 1)
    assert default_device() == torch.device("cuda", 1)


def test_a_launched_process_takes_its_own(gpus):
    gpus.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cuda", 1)
    gpus.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == torch.device("cpu")


def test_without_one_it_is_the_cpu(gpus):
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    gpus.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cpu")


def test_a_named_one_is_taken_in_any_case(gpus):
    gpus.setenv("LOCAL_RANK", "1")
    gpus.setenv(VARIABLE, "meta")
    assert default_device() == torch.device("meta")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(ConfigError, match=f"device '{name}' cannot be used .*name another by --device or {VARIABLE}"):
        default_device()


class Family:
    """Says where it was asked to load to."""

    @classmethod
    def from_pretrained(cls, record, *, device, **_):
        return SimpleNamespace(where=torch.device(device))


@pytest.mark.parametrize(("load", "name"), [(load_backbone, "sd3.5-medium"), (load_reward, "hpsv2")])
def test_networks_are_loaded_there_unless_told_otherwise(gpus, load, name):
    gpus.setattr("stitchvm.core.loading.family_class", lambda record: Family)
    gpus.setattr("stitchvm.core.loading._adopted", lambda network, record: network)
    gpus.setenv("LOCAL_RANK", "1")
    assert load(name).where == torch.device("cuda", 1)
    assert load(name, device="cuda:0").where == torch.device("cuda", 0)
    gpus.setenv(VARIABLE, "cpu")
    assert load(name).where == torch.device("cpu")


def test_so_are_the_parts_of_a_sum(monkeypatch):
    asked = []
    monkeypatch.setattr("stitchvm.core.joint.load_reward", lambda name, device: asked.append(device) or load_twin(name))
    JointReward(["hpsv2", "aesthetic"])
    JointReward(["hpsv2", "aesthetic"], device="cuda")
    assert asked == [None, None, "cuda", "cuda"]


def load_twin(name):
    from stitchvm.core import build_twin, registry

    return build_twin(registry().reward(name))


def test_the_command_line_names_one(run, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "cpu")
    (tmp_path / "prompts").write_text("a cat")
    where = ("--prompts", tmp_path / "prompts", "--out", tmp_path / "out")
    code, _, errors = run("--device", "nonsense", "align", "sample", "sd3.5-medium", "--reward", "hpsv2", *where)
    assert code == 2
    assert "device 'nonsense' cannot be used" in errors
