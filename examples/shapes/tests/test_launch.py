"""Training from the command line in several processes, by the launcher that users have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TRAIN = (
    "-m", "stitchvm.core.cli", "align", "draft", "shapes-mmdit", "--prompts", "shapes", "--count", "4", "--reward",
    "shapes-aesthetic", "--steps", "2", "--train", "updates=2", "--train", "prompts_per_update=2", "--train",
    "tracker=null", "--train", "lora=null", "--out",
)  # fmt: skip
LAUNCH = (
    "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def python(*arguments: object) -> str:
    """What it prints."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_accelerate_launch_with_fsdp_trains_what_one_process_does(tmp_path: Path) -> None:
    one = python(*TRAIN, tmp_path / "one")
    two = python(*LAUNCH, *TRAIN, tmp_path / "two")
    assert one.count("shapes-aesthetic") == two.count("shapes-aesthetic") == 1, "one process alone says what came of it"
    alone, shared = (load_file(tmp_path / which / "state.safetensors") for which in ("one", "two"))
    assert alone.keys() == shared.keys()
    network = json.loads((tmp_path / "two" / "transformer" / "config.json").read_text())
    assert network["_class_name"] == "SD3Transformer2DModel"
    for name in (each for each in alone if each.startswith("policy.")):
        torch.testing.assert_close(shared[name], alone[name], rtol=0, atol=3e-5)  # a step is 3e-4
    costs = [json.loads((tmp_path / which / "train.json").read_text())["cost"] for which in ("one", "two")]
    kinds = set(costs[0]) - {"seconds", "peak_memory"}
    assert {kind: costs[0][kind] for kind in kinds} == {kind: costs[1][kind] for kind in kinds}
