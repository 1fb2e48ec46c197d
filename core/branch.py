"""What a value model reads of one reward, and where it was cut in."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor, nn

from .layer import StitchingLayer
from .reward import Tail


@attrs.frozen
class Interface:
    """Where two networks are cut: after backbone block ``i`` (``LATENT`` for VAE stitching), before reward block
    ``j``."""

    i: int
    j: int


class Branch(nn.Module):
    """One reward's half of a value model: ``[B, C, h, w]`` backbone features to the reward's output."""

    def __init__(self, layer: StitchingLayer, tail: Tail) -> None:
        super().__init__()
        self.layer = layer
        self.tail = tail

    def forward(self, grid: Tensor, *, return_hidden: bool = False) -> Any:
        """What :class:`Tail` returns."""
        return self.tail(self.layer(grid), return_hidden=return_hidden)
