"""What a head reads beside the latents of a batch: each example's prompt, or the null prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import attrs
import torch
from torch import Tensor

from ..backbone import Backbone
from ..conditions import Condition, concatenate
from ..errors import ConfigError

_AT_ONCE = 32
"""Prompts that a text encoder reads."""


@attrs.frozen(eq=False)
class Texts:
    """A backbone's conditions by the number of a prompt, from -1 (the null prompt) on, kept on the CPU."""

    every: Condition

    @classmethod
    def of(cls, null: Condition, prompts: Condition | None = None) -> Self:
        """``null`` of one sample, and the ``prompts`` that examples were drawn for, in the order of their numbers."""
        null = null.to("cpu")
        return cls(null if prompts is None else concatenate([null, prompts.to("cpu")]))

    def read(self, numbers: Tensor, device: torch.device) -> Condition:
        """The conditions of the prompts of these ``numbers [B]``."""
        return self.every.index(numbers.long().cpu() + 1).to(device)


def encode_all(backbone: Backbone, prompts: Sequence[str] | None) -> Condition:
    """The backbone's condition of every prompt, in their order, on the CPU; :class:`ConfigError` where there are
    none."""
    if not prompts:
        raise ConfigError("the recipe reads samples under the prompts they are drawn for; pass prompts.")
    parts = [list(prompts[start : start + _AT_ONCE]) for start in range(0, len(prompts), _AT_ONCE)]
    return concatenate([backbone.encode_prompts(part).to("cpu") for part in parts])
