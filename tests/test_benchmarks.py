"""The benchmarks measure what they say, on networks small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from stitchvm import core
from stitchvm.core import Tweedie
from stitchvm.plugins import checkpoints

TINY = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8,
    "joint_attention_dim": 24, "pooled_projection_dim": 8, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip


FOLDER = Path(__file__).parent.parent / "benchmarks"

GUIDED = {"head": 1, "tail": 1, "denoiser": 1, "resumed": 1}
TWEEDIE = {"denoiser": 2, "decoder": 1, "reward": 1}
PASSES = {
    "unguided": {"denoiser": 2},
    "stitched": GUIDED,
    "stitched-no-reuse": {"head": 1, "tail": 1, "denoiser": 2},
    "tweedie": TWEEDIE,
    "tweedie-checkpointing": TWEEDIE,
    "one-proposal": GUIDED,
    "two-proposals": GUIDED | {"head": 2, "tail": 2},
    "tweedie-value": TWEEDIE,
}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def head_loading(monkeypatch) -> Any:
    module = script("head_loading", monkeypatch)
    monkeypatch.setattr(checkpoints, "safe_open", checkpoints.safe_open)  # the benchmark counts through it
    return module


@pytest.fixture
def sd35(monkeypatch) -> Any:
    return script("sd35", monkeypatch)


@pytest.fixture
def processes(monkeypatch) -> Any:
    return script("processes", monkeypatch)


@pytest.fixture
def guidance(monkeypatch, sd35, processes) -> Any:
    return script("guidance_sd35", monkeypatch)


@pytest.fixture
def training(monkeypatch, sd35, processes) -> Any:
    return script("training_sd35", monkeypatch)


def test_head_loading_counts_what_is_read(head_loading, tmp_path):
    record = head_loading.Case("flux-dev", 2, 1.0, TINY).record
    head_loading.write_checkpoint(record, tmp_path, shard=20_000)
    shards = sum(file.stat().st_size for file in (tmp_path / "transformer").glob("*.safetensors"))
    here = attrs.evolve(record, repo=None, path=str(tmp_path))
    head, whole = (head_loading.measure(here, cut) for cut in (2, None))
    held = [core.load_backbone(here, cut=cut).net.state_dict().values() for cut in (2, None)]
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in held]
    assert [head["read"], whole["read"]] == sizes
    assert head_loading.share_of_shapes(record, 2) == pytest.approx(sizes[0] / sizes[1])
    assert sizes[0] <= head["shards"] < whole["shards"] == shards
    assert head["peak"] >= head["before"] > 0


def test_every_figure_takes_its_passes(guidance, sd35):
    networks = sd35.Networks.build(small=True)
    assert {networks.backbone.dtype, networks.vae.dtype, networks.reward.dtype} == {torch.bfloat16}
    trained = (networks.backbone, networks.vae, networks.reward, networks.value)
    assert not any(tensor.requires_grad for network in trained for tensor in network.parameters())
    for name, figure in guidance.FIGURES.items():
        found = guidance.measure(networks, figure, repeats=2)
        assert found["passes"] == PASSES[name], name
        assert len(found["seconds"]) == 2
        assert 0 < found["min"] <= found["median"]


def test_random_weights_are_the_same_every_time(sd35):
    first, again = (sd35.Networks.build(small=True) for _ in range(2))
    for name in ("backbone", "vae", "reward", "value"):
        pairs = zip(getattr(first, name).parameters(), getattr(again, name).parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name
    norm, weight = (first.vae.decoder.conv_norm_out.weight, first.backbone.net.transformer_blocks[0].attn.to_q.weight)
    assert bool((norm == 1).all())
    assert float(weight.float().std()) == pytest.approx(sd35.DEVIATION, rel=5 / math.sqrt(2 * weight.numel()))
    assert not torch.equal(first.prompt["embeds"], first.null["embeds"])


def test_checkpointing_runs_blocks_again_and_changes_no_gradient(sd35):
    networks = sd35.Networks.build(small=True, dtype=torch.float32)
    parts = {
        "denoiser": networks.backbone.net.transformer_blocks[1],
        "decoder": networks.vae.decoder.up_blocks[0],
        "reward": networks.reward.net.transformer.resblocks[1],
    }
    runs = []
    for name, part in parts.items():
        # before, not after: a recomputation stops as soon as all that was asked for is there
        part.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    problem = networks.problem(Tweedie(networks.reward))
    gradients, seen = [], []
    for checkpointing in (False, True):
        if checkpointing:
            networks.checkpoint_gradients()
        runs.clear()
        gradients.append(problem.differentiate(networks.noise, problem.sigmas[25]).gradients)
        seen.append({name: runs.count(name) for name in parts})
    assert seen == [dict.fromkeys(parts, 1), dict.fromkeys(parts, 2)]
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_peak_memory_is_what_was_held_inside(sd35):
    size = 64 << 20
    for before in (0, 4 * size):  # what was held and given back earlier does not count
        torch.ones(before, dtype=torch.uint8)
        with sd35.PeakMemory(torch.device("cpu")) as memory:
            torch.ones(size, dtype=torch.uint8)
        assert size * 0.95 < memory.bytes < size * 1.25, before


def test_ratios_of_known_figures(guidance):
    seconds = {
        "unguided": 10, "stitched": 13, "stitched-no-reuse": 15, "tweedie": 52, "tweedie-checkpointing": 65,
        "one-proposal": 11, "two-proposals": 13, "tweedie-value": 18,
    }  # fmt: skip
    figures = {name: {"min": value, "memory": value} for name, value in seconds.items()}
    found = guidance.ratios(figures)
    assert {name: (round(ratio.value, 6), ratio.met) for name, ratio in found.items()} == {
        "guided / unguided step": (1.3, True),
        "guided without reuse / unguided step": (1.5, None),
        "Tweedie-guided / guided step": (4, False),
        "the same, checkpointing": (5, None),
        "memory, guided / Tweedie-guided": (0.25, False),
        "memory, guided / checkpointing": (0.2, None),
        "proposal / unguided step": (0.2, False),
        "each of two proposals / unguided step": (0.15, None),
        "Tweedie's estimate / proposal": (9, False),
    }
    noisy = guidance.ratios(figures | {"two-proposals": {"min": 11}, "tweedie": {"failed": "killed by signal 9"}})
    lost = {name for name, ratio in noisy.items() if ratio.met is None and ratio.target is not None}
    assert lost == {
        "Tweedie-guided / guided step", "memory, guided / Tweedie-guided", "proposal / unguided step",
        "Tweedie's estimate / proposal",
    }  # fmt: skip


def test_taken_in_turn_the_ratio_is_the_median_of_the_rounds(guidance):
    """The machine becomes slower and slower; by the least of each one's seconds it would be 1.2."""
    figures = {
        "unguided": {"seconds": [10, 20, 30], "min": 10, "in_turn": True},
        "stitched": {"seconds": [12, 30, 39], "min": 12, "in_turn": True},
    }
    found = guidance.ratios(figures)
    assert found["guided / unguided step"].value == pytest.approx(1.3)
    assert found["Tweedie-guided / guided step"].met is None


def test_steps_in_turn_are_those_of_a_process_each(guidance, sd35):
    networks = sd35.Networks.build(small=True)
    names = [name for name, figure in guidance.FIGURES.items() if not figure.checkpointing]
    found = guidance.measure_in_turn(networks, names, repeats=2)
    assert {name: figure["passes"] for name, figure in found.items()} == {name: PASSES[name] for name in names}
    assert all(len(figure["seconds"]) == 2 for figure in found.values())


def test_attention_is_taken_back_both_ways_in_turn(monkeypatch, capsys):
    attention = script("attention_backward", monkeypatch)
    assert all(own > 0 and products > 0 for own, products in attention.rounds(2, 16, 3))
    monkeypatch.setattr(attention, "SIZES", {"tiny": (2, 16)})
    monkeypatch.setattr("sys.argv", ["attention_backward.py", "--threads", "1", "--repeats", "1"])
    attention.main()
    assert "| tiny | " in capsys.readouterr().out


def test_a_figure_that_fails_is_reported(guidance, processes, monkeypatch):
    def starved(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], -9, "", "")

    monkeypatch.setattr(processes.subprocess, "run", starved)
    given = processes.arguments(processes.parser_of("", guidance.FIGURES), ["--small"])
    figures = {"tweedie": guidance.fresh(guidance.__file__, "tweedie", given)}
    assert figures == {"tweedie": {"failed": "killed by signal 9"}}
    assert "| step guided by Tweedie's estimate | killed by signal 9 |" in guidance.table(figures)
    json.dumps(guidance.report(figures, small=True, dtype="float32"), allow_nan=False)


def test_guidance_runs_from_end_to_end(guidance, tmp_path, capsys):
    out = tmp_path / "guidance.json"
    settings = ["--small", "--only", "stitched", "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert guidance.main(settings) == 0, capsys.readouterr().err
    written = json.loads(out.read_text())
    figure = written["figures"]["stitched"]
    assert (figure["passes"], figure["threads"], written["dtype"]) == (GUIDED, 1, "bfloat16")
    assert figure["device"]
    assert written["versions"]["torch"]
    assert f"| step guided by the stitched value | {figure['min']:.3f} |" in capsys.readouterr().out


def test_every_iteration_of_training_takes_its_passes(training, sd35):
    """Two samples. DRaFT-1 of 10 steps: 10 passes a sample, the last one by the frozen backbone too. DiffusionNFT: 10
    passes a sample, and three at each of the 10 levels. Stopped at 5: half of them, and a head for the decoder."""
    clean, value = {"decoder": 2, "reward": 2}, {"head": 2, "tail": 2}
    backward = {"decoder_backward": 2, "reward_backward": 2}
    expected = {
        "draft": {"denoiser": 22, "denoiser_backward": 2, **clean, **backward},
        "draft-stopped": {"denoiser": 12, "denoiser_backward": 2, **value, "head_backward": 2},
        "nft": {"denoiser": 20 + 60, "denoiser_backward": 20, **clean},
        "nft-stopped": {"denoiser": 10 + 30, "denoiser_backward": 10, **value},
    }
    for name, figure in training.FIGURES.items():
        found = training.measure(sd35.Networks.build(small=True), figure, repeats=1)
        assert found["passes"] == expected[name], name
        assert found["min"] > 0


def test_the_ratios_of_training_are_those_of_its_figures(training):
    figures = {name: {"min": seconds, "memory": seconds} for name, seconds in
               {"draft": 10.0, "draft-stopped": 4.0, "nft": 50.0, "nft-stopped": 20.0}.items()}  # fmt: skip
    found = training.ratios(figures)
    assert set(found.values()) == {0.4}
    figures["nft"] = {"failed": "killed by signal 9"}
    assert math.isnan(training.ratios(figures)["DiffusionNFT, stopped / plain, time"])
    assert "killed by signal 9" in training.table({"nft": figures["nft"]})
