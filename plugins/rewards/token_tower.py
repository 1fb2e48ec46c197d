"""What vision transformers share when they are cut: a state of tokens, some of them before the patches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stitchvm.core import Reward, SliceError

Transform = Callable[[Tensor], Tensor]
"""``[B, 3, H, W]`` in [0, 1] to a tower's normalised pixels ``[B, 3, S, S]``, differentiable."""


class TokenTower(Reward):
    """A :class:`Reward` whose state is ``[B, prefix_count + grid_size^2, C]``: prefix tokens, then patches by row."""

    def __init__(
        self, net: nn.Module, transform: Transform, *, image_size: int, grid_size: int, prefix_count: int
    ) -> None:
        super().__init__(net)
        self.image_size = image_size
        self.grid_size = grid_size
        self.prefix_count = prefix_count
        self._transform = transform

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """``[P, C]``: the positional embedding, of the last ``P`` tokens (all of them, or the patches alone)."""

    def preprocess(self, images: Tensor) -> Tensor:
        return self._transform(images)

    def check_pixels(self, x: Tensor) -> None:
        """Raise :class:`SliceError` unless ``x`` is what :meth:`preprocess` gives."""
        if x.shape[1:] != (3, self.image_size, self.image_size):
            raise SliceError(
                f"{type(self).__name__} reads pixels [batch, 3, {self.image_size}, {self.image_size}], got "
                f"{list(x.shape)}; preprocess the images first."
            )

    def grid(self, state: Tensor) -> Tensor:
        patches = state[:, self.prefix_count :]
        return patches.transpose(1, 2).reshape(len(state), -1, self.grid_size, self.grid_size)

    def prefix(self, state: Tensor) -> Tensor:
        return state[:, : self.prefix_count]

    def enter(self, grid: Tensor, prefix: Tensor, *, positions: bool = False) -> Tensor:
        self.check_grid(grid)
        first = prefix.to(grid.dtype).expand(len(grid), -1, -1)
        tokens = torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
        if not positions:
            return tokens
        table = self.positions.to(tokens.dtype)
        bare = tokens.shape[1] - len(table)
        return torch.cat([tokens[:, :bare], tokens[:, bare:] + table], dim=1)

    def example(self, batch: int = 1) -> tuple[Tensor, None]:
        return torch.zeros(batch, 3, self.image_size, self.image_size, device=self.device), None
