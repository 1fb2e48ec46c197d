"""A ConvNeXt classifier of timm's as a reward: how sure it is that an image shows one class."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor

from stitchvm.core import Condition, ConfigError, Reward, RewardOutput, RewardRecord, SliceError, resolve_source

from .weights import load, read_config

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OWN = ("model", "image_size", "crop", "label")


class ConvNextReward(Reward):
    """A ``Reward`` over timm's ``ConvNeXt``: no tokens and no positions, a state is a map ``[B, C, H, W]``.

    The score is the log-probability of class ``label``, at most 0. A reward shows maps of one size at every cut, and
    a ConvNeXt's shrink from stage to stage: its blocks are therefore those of the first stage, and the later stages
    belong to the exit. That is where value models enter anyway: deeper cuts of a reward are not recoverable.
    """

    net: ConvNeXt
    condition_kind = "nothing"
    prefix_count = 0

    def __init__(self, net: ConvNeXt, image_size: int, crop: float, label: int) -> None:
        super().__init__(net)
        if not 0 <= label < net.num_classes:
            raise ConfigError(f"label is {label}; this ConvNeXt tells classes 0 to {net.num_classes - 1} apart.")
        self.image_size, self.crop, self.label = image_size, crop, label
        self.grid_size = image_size // 4
        self._blocks, self._stages = len(net.stages[0].blocks), len(net.stages)

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("stem", "stages.0.downsample")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"stages.0.blocks.{k}" for k in range(self._blocks))

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return (*(f"stages.{k}" for k in range(1, self._stages)), "norm_pre", "head")

    def stem(self, x: Tensor, condition: object = None) -> Tensor:
        if x.shape[1:] != (3, self.image_size, self.image_size):
            raise SliceError(
                f"this ConvNeXt reads pixels [batch, 3, {self.image_size}, {self.image_size}], got {list(x.shape)}; "
                "preprocess the images first."
            )
        state: Tensor = self.net.stages[0].downsample(self.net.stem(x.to(self.dtype)))
        return state

    def block(self, k: int, state: Tensor) -> Tensor:
        result: Tensor = self.net.stages[0].blocks[k - 1](state)
        return result

    def exit(self, state: Tensor) -> RewardOutput:
        """The last stage's map after the head's norm, as tokens by row; the pooled embedding; the class's score."""
        for k in range(1, self._stages):
            state = self.net.stages[k](state)
        features = self.net.norm_pre(state)
        embedding = self.net.forward_head(features, pre_logits=True)
        score = F.log_softmax(self.net.head.fc(embedding).float(), dim=-1)[:, self.label]
        return RewardOutput(self.net.head.norm(features).flatten(2).transpose(1, 2), embedding, score)

    def grid(self, state: Tensor) -> Tensor:
        return state

    def upstream(self, x: Tensor, condition: object = None) -> Tensor:
        embedding: Tensor = self.net.forward_head(self.net.forward_features(x), pre_logits=True)
        return embedding

    def example(self, batch: int = 1) -> tuple[Tensor, None]:
        return torch.zeros(batch, 3, self.image_size, self.image_size, device=self.device), None

    # -- entering, scoring --------------------------------------------------------------------------------------------

    def prefix(self, state: Tensor) -> Tensor:
        return state.new_zeros(len(state), 0, state.shape[1])

    def enter(self, grid: Tensor, prefix: Tensor, *, positions: bool = False) -> Tensor:
        """The map itself: there are no other tokens, and no positions to add."""
        self.check_grid(grid)
        return grid

    def preprocess(self, images: Tensor) -> Tensor:
        """The shorter side to ``image_size / crop`` and the middle of that, normalised with ImageNet's statistics."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ConfigError(f"images must be [batch, 3, height, width] in [0, 1], got {list(images.shape)}.")
        height, width = images.shape[-2:]
        short = int(self.image_size / self.crop)
        sides = [short * side // min(height, width) for side in (height, width)]
        pixels = F.interpolate(images.float(), sides, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.image_size) // 2 for side in sides)
        pixels = pixels[..., top : top + self.image_size, left : left + self.image_size]
        mean, std = (torch.tensor(v, device=images.device).reshape(3, 1, 1) for v in (_MEAN, _STD))
        return (pixels - mean) / std

    def encode_prompts(self, prompts: list[str]) -> Condition:
        raise ConfigError("a ConvNeXt classifier scores images alone; there are no prompts to encode.")

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        if condition.tensors:
            raise ConfigError("a ConvNeXt classifier scores images alone; leave the condition out.")
        assert output.score is not None
        return output.score

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """``architecture``: timm's ``model``, ``image_size`` in pixels, the ``crop`` of the resized image that is read,
        the class ``label``, and whatever else the model takes. Raises :class:`ConfigError` for what it does not take.
        """
        if missing := [name for name in _OWN if name not in architecture]:
            raise ConfigError(f"a ConvNeXt's architecture lacks {', '.join(missing)}.")
        settings = {name: value for name, value in architecture.items() if name not in _OWN}
        with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
            try:
                net = timm.create_model(architecture["model"], **settings)
            except (TypeError, RuntimeError) as error:
                raise ConfigError(f"timm cannot make {architecture['model']!r}: {error}.") from error
        if type(net) is not ConvNeXt:
            raise ConfigError(f"{architecture['model']!r} is a {type(net).__name__}, expected a ConvNeXt.")
        own = (architecture["image_size"], architecture["crop"], architecture["label"])
        return cls(net.requires_grad_(False).to(device), *own).eval()

    @classmethod
    def from_pretrained(
        cls,
        record: RewardRecord,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """A folder or hub repository in timm's layout; the architecture is the record's.

        Raises ``WeightsError`` for weights that are missing, damaged or of another architecture.
        """
        fetch = partial(resolve_source, record, token=token, local_files_only=local_files_only)
        folder: Path = fetch(patterns=("config.json", "model.safetensors"))
        read_config(folder / "config.json", {"architecture": record.architecture.get("model")})
        reward = cls.build(record.architecture, device="meta")
        load(reward.net, [folder / "model.safetensors"], dtype=dtype or torch.float32, device=device)
        return reward
