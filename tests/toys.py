"""The packages that ``stitchvm new-plugin`` writes, imported: good plugins that mutants are made from."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from stitchvm.core import Condition, ConfigError, RewardOutput
from stitchvm.core.scaffold import plugin_files

FOLDER = Path(tempfile.mkdtemp(prefix="stitchvm-toys-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

for _kind in ("backbone", "reward", "aligner"):
    for _path, _text in plugin_files(f"toy-{_kind}", _kind).items():
        (FOLDER / _path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / _path).write_text(_text)
sys.path.insert(0, str(FOLDER))

Backbone: Any = import_module("stitchvm_toy_backbone.model").ToyBackboneBackbone
Reward: Any = import_module("stitchvm_toy_reward.model").ToyRewardReward
Aligner: Any = import_module("stitchvm_toy_aligner.model").ToyAlignerAligner
BACKBONE_TWIN = {"channels": 4, "width": 8, "depth": 3, "resolution": 32}
REWARD_TWIN: dict[str, Any] = import_module("stitchvm_toy_reward").TWIN


class Scored(Reward):
    """The toy reward, comparing with nothing."""

    condition_kind = "nothing"

    def exit(self, state):
        found = super().exit(state)
        return RewardOutput(found.tokens, found.embedding, found.embedding.tanh().mean(1))

    def encode_prompts(self, prompts):
        raise ConfigError("it scores images alone.")

    def score(self, output, condition):
        if condition.tensors:
            raise ConfigError("it scores images alone; leave the condition out.")
        return output.score


class Likeness(Reward):
    """The toy reward, comparing with reference images."""

    condition_kind = "images"

    def encode_prompts(self, prompts):
        raise ConfigError("it compares with images.")

    def condition(self, prompts):
        if prompts is None or isinstance(prompts, Condition) or isinstance(prompts[0], str):
            return super().condition(prompts)
        pixels = torch.cat([self.preprocess(image[None]) for image in prompts])
        return Condition({"text": self.net(pixels).mean(0, keepdim=True)})


def make(cls: Any) -> Any:
    """A small network with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls.build(REWARD_TWIN if issubclass(cls, Reward) else BACKBONE_TWIN)
