"""What a training is for: samples of the trained policy have a higher value than its backbone's, on the same noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import families
from stitchvm import core
from stitchvm.core import Update
from stitchvm.core.training.run import training_settings
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo
from training_worlds import Brightness, problem

METHODS = {
    "draft": Draft(stop=(2, 3)),
    "nft": DiffusionNft(samples_per_prompt=8, stop=(2, 3)),
    "dpo": DiffusionDpo(samples_per_prompt=8, stop=(2, 3), beta=100.0),
    "grpo": FlowGrpo(samples_per_prompt=4, stop=(2, 3)),
}
PROMPTS = ["a red ball", "a blue box"]
PLAN = {"prompts_per_update": 2, "evaluate_every": 100, "lora": {"rank": 2, "alpha": 4}, "tracker": None, "batch": 64}


def train(method: object, out: Path, **training: object) -> core.TrainResult:
    plan = {**PLAN, **training}
    return core.train(method, families.mmdit(), Brightness(), PROMPTS, out=out, training=plan, reward=families.clip(),
                      steps=5, evaluation_prompts=PROMPTS[:1], progress=False)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_trained_policys_samples_are_brighter_than_its_backbones_on_the_same_noise(name, tmp_path):
    """On noise that it was not trained on: by more than four standard errors over 64 pairs. (What was not trained at
    all differs by nothing.)"""
    policy = train(METHODS[name], tmp_path, updates=10, learning_rate=5e-3, ema_decay=0.0).policy
    task = problem(seed=1)
    owners, noise = torch.tensor([0, 1]).repeat_interleave(32), task.noise(task.seeds(Update(0, (0, 1), (0, 1)), 32, 9))
    ends = [task.rollout(net, noise, owners, 3) for net in (policy.backbone, task.reference)]
    after, before = (torch.tanh(end.flatten(1).mean(1)) for end in ends)
    gained = after - before
    assert float(gained.mean()) > 4 * float(gained.std()) / 8
    assert float(gained.mean()) > 0.01


def test_flow_grpo_takes_the_released_two_steps_on_what_it_collected(tmp_path):
    """The second is off policy: its ratios are no longer 1 and the clip acts."""
    assert training_settings(FlowGrpo(), None).inner_updates == 2
    assert training_settings(FlowGrpo(), {"inner_updates": 1}).inner_updates == 1
    method = FlowGrpo(samples_per_prompt=2, kl_weight=0.0)
    one = train(method, tmp_path / "one", updates=2, inner_updates=1).record.history
    two = train(method, tmp_path / "two", updates=2).record.history
    assert [entry["ratio"] for entry in one] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert all(abs(entry["ratio"] - 1) > 1e-5 for entry in two)
