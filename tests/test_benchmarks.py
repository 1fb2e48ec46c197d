"""The benchmarks measure what they say, on networks small enough for a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from stitchvm import core
from stitchvm.plugins import checkpoints

TINY = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8,
    "joint_attention_dim": 24, "pooled_projection_dim": 8, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip


@pytest.fixture
def head_loading(monkeypatch) -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "head_loading.py"
    spec = importlib.util.spec_from_file_location("head_loading", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "head_loading", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(checkpoints, "safe_open", checkpoints.safe_open)  # the benchmark counts through it
    return module


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
