"""PixArt's prompts: T5's tokens and which of them count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor


class TextSide(Protocol):
    """Prompts to ``{"embeds": [B, T, D], "mask": [B, T]}``, 1 where a token counts."""

    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]: ...


@attrs.define(eq=False)
class T5Text:
    """Through the pipeline's own ``encode_prompt``; the pipeline is opened on first use."""

    open_pipeline: Callable[[], Any]
    tokens: int
    _pipeline: Any = attrs.field(default=None, init=False)

    @torch.no_grad()
    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        if self._pipeline is None:
            self._pipeline = self.open_pipeline()
        self._pipeline.text_encoder.to(device)
        embeds, mask, _, _ = self._pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=self.tokens
        )
        return {"embeds": embeds, "mask": mask.float()}


@attrs.frozen
class HashedText:
    """For a network with random weights: a normal vector a word, seeded by its hash. It means nothing."""

    tokens: int
    width: int

    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds = torch.zeros(len(prompts), self.tokens, self.width)
        mask = torch.zeros(len(prompts), self.tokens)
        for row, prompt in enumerate(prompts):
            # T5 ends every prompt with a token of its own, the empty one too
            words = [*prompt.split()[: self.tokens - 1], "</s>"]
            mask[row, : len(words)] = 1
            for column, word in enumerate(words):
                seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
                embeds[row, column] = torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
        return {"embeds": embeds.to(device), "mask": mask.to(device)}
