"""The packages that ``stitchvm new-plugin`` writes, imported, and a method that trains: good plugins that mutants are
made from."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch

from stitchvm.core import Condition, ConfigError, Experience, RewardOutput, as_sigma
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


@attrs.frozen(kw_only=True)
class Trainer:
    """Weighted regression: denoise better where a sample of the old policy was better than its group."""

    needs_old: ClassVar[bool] = True

    samples_per_prompt: int = attrs.field(default=4, validator=attrs.validators.ge(2))
    level: float = 0.5

    @torch.no_grad()
    def collect(self, problem, update):
        count, sampler = self.samples_per_prompt, problem.old.backbone
        owners = problem.owners(update, count)
        clean = problem.rollout(sampler, problem.noise(problem.seeds(update, count, 0)), owners, problem.steps)
        values = problem.values(clean, owners, problem.steps, sampler)
        samples = {"clean": clean.cpu(), "advantage": problem.advantages(values, count).cpu(),
                   "seed": problem.seeds(update, count, 1)}  # fmt: skip
        return Experience.of_samples(samples, owners, {"value": float(values.mean())})

    def loss(self, problem, rows):
        clean = rows["clean"]
        latents = (1 - self.level) * clean + self.level * problem.noise(rows["seed"])
        found = problem.context(rows.owners).denoiser(latents, as_sigma(self.level, latents))
        error = (found.z0 - clean).square().flatten(1).mean(1)
        return rows["advantage"] * error, {"error": float(error.detach().mean())}

    def check(self, problem):
        pass

    def updated(self, problem, number):
        problem.old.follow(problem.policy, 0.5)


def make(cls: Any) -> Any:
    """A small network with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls.build(REWARD_TWIN if issubclass(cls, Reward) else BACKBONE_TWIN)
