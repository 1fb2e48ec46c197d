"""The stitching layer between a backbone's grid and a reward's patch grid (paper, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .grids import resample

BOTTLENECK = 8
"""``G`` narrows to 1/8 of the reward's width (paper)."""


class StitchingLayer(nn.Module):
    """``s(h) = Up(F(h)) + G(Up(F(h)))``: ``[B, c_in, H, W]`` to ``[B, c_out, side, side]``.

    ``F`` is a 1x1 convolution that takes the closed-form map; ``G = conv1x1 . SiLU . conv1x1 . SiLU`` starts at zero
    because its last convolution does.
    """

    def __init__(self, c_in: int, c_out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.linear = nn.Conv2d(c_in, c_out, 1)
        hidden = max(c_out // BOTTLENECK, 1)
        self.down = nn.Conv2d(c_out, hidden, 1)
        self.up = nn.Conv2d(hidden, c_out, 1)
        # seeded by itself: the same pair always starts from the same layer, whatever was drawn before
        own = torch.Generator().manual_seed(0)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=own)
        nn.init.zeros_(self.down.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def load_map(self, weight: Tensor, bias: Tensor) -> None:
        """Take a closed-form ``weight [c_out, c_in]`` and ``bias [c_out]``."""
        self.linear.weight.copy_(weight[:, :, None, None])
        self.linear.bias.copy_(bias)  # type: ignore[union-attr]

    def forward(self, grid: Tensor) -> Tensor:
        mapped = resample(self.linear(grid), self.side)
        return mapped + self.up(F.silu(self.down(F.silu(mapped))))
