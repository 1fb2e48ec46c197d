"""The finished SD3 model as a teacher: its predictions vary far less than the noise it was trained on, so that the
other backbones learn from it in a fraction of the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import mmdit
from .clip import tokenise
from .tokens import build_tokenizer


class Teacher:
    """Velocities of the exported `shapes-mmdit`, without gradient."""

    def __init__(self, folder: Path, compiled: bool = False) -> None:
        pipe = mmdit.load(folder)
        self.vae_shift = float(pipe.vae.config.shift_factor * pipe.vae.config.scaling_factor)
        self.transformer = pipe.transformer.requires_grad_(False).eval()
        self.encoders = [encoder.requires_grad_(False).eval() for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        self.empty = tokenise(build_tokenizer(), [""])[0]
        self._forward: Any = torch.compile(self.transformer) if compiled else self.transformer

    @torch.no_grad()
    def velocity(self, latents: Tensor, t: Tensor, ids: Tensor, compiled: bool = True) -> Tensor:
        """What it predicts for noisy latents [B, 8, 16, 16] at levels [B] in 0 .. 1 under token ids [B, 24]."""
        tokens, pooled = mmdit.encode_ids(self.encoders, ids)
        forward = self._forward if compiled else self.transformer
        velocity: Tensor = forward(
            hidden_states=latents,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=t * 1000,
            return_dict=False,
        )[0]
        return velocity

    def guided(self, latents: Tensor, t: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
        """The same under classifier-free guidance with a scale [B] of its own for each sample."""
        empty = self.empty.expand_as(ids)
        both = self.velocity(torch.cat([latents, latents]), torch.cat([t, t]), torch.cat([ids, empty]))
        prompted, null = both.chunk(2)
        return null + scale[:, None, None, None] * (prompted - null)
