"""Feature grids ``[B, C, H, W]``: at another resolution, and several side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resample(grid: Tensor, size: int | tuple[int, int]) -> Tensor:
    """``Up``: bilinear ``[B, C, H, W]`` to ``size`` (rows and columns, or the side of a square), antialiased when it
    shrinks; the identity at equal size. In float32 at least: torch has no antialiasing in half precision on the
    CPU."""
    size = (size, size) if isinstance(size, int) else size
    if grid.shape[-2:] == size:
        return grid
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True).to(grid.dtype)


def side_by_side(grids: Sequence[Tensor]) -> Tensor:
    """Several grids as one, their channels in order, at the resolution of the finest; a single grid as it is."""
    if len(grids) == 1:
        return grids[0]
    rows, columns = max((grid.shape[-2], grid.shape[-1]) for grid in grids)
    return torch.cat([resample(grid, (rows, columns)) for grid in grids], dim=1)
