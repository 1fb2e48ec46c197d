"""CLIP: open_clip's ``VisionTransformer`` cut after any of its blocks, scored against the text tower's embedding."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from stitchvm.core import RewardOutput, SliceError

from .openclip import OpenClipReward, TextTower
from .quick_gelu import take_quick_gelu_in_one
from .token_tower import TokenTower, Transform


class ClipReward(OpenClipReward, TokenTower):
    """A :class:`Reward` over open_clip's ``VisionTransformer``; its score is the cosine similarity with the prompt.

    The state is the tokens ``[B, 1 + grid_size^2, C]``, CLS first. ``companions`` is the :class:`TextTower`. A tower's
    QuickGELU is replaced by one that gives the same numbers and keeps less for the backward pass.
    """

    net: VisionTransformer
    enter_modules = ("positional_embedding",)

    def __init__(self, visual: nn.Module, transform: Transform, text: TextTower | None = None) -> None:
        tower = _supported(visual)
        take_quick_gelu_in_one(tower)
        super().__init__(tower, transform, image_size=tower.image_size[0], grid_size=tower.grid_size[0], prefix_count=1)
        self.companions = text
        self._layers = len(tower.transformer.resblocks)
        self._batch_first = tower.transformer.batch_first

    @classmethod
    def check_tower(cls, visual: nn.Module) -> int:
        return int(_supported(visual).image_size[0])

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"transformer.resblocks.{k}" for k in range(self._layers))

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("ln_post", "proj")

    @property
    def positions(self) -> Tensor:
        return self.net.positional_embedding

    def stem(self, x: Tensor, condition: object = None) -> Tensor:
        """Patches behind the CLS token, with positions, normalised."""
        self.check_pixels(x)
        net = self.net
        patches = net.conv1(x.to(self.dtype)).flatten(2).transpose(1, 2)
        cls = net.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + net.positional_embedding.to(patches.dtype)
        return net.ln_pre(net.patch_dropout(tokens))

    def block(self, k: int, state: Tensor) -> Tensor:
        block = self.net.transformer.resblocks[k - 1]
        if self._batch_first:
            return block(state)
        return block(state.transpose(0, 1).contiguous()).transpose(0, 1)

    def exit(self, state: Tensor) -> RewardOutput:
        """All tokens after ``ln_post``, and the pooled, projected embedding that ``visual`` returns."""
        net = self.net
        tokens = net.ln_post(state)
        pooled = self._pool(state if net.final_ln_after_pool else tokens)
        if net.final_ln_after_pool:
            pooled = net.ln_post(pooled)
        return RewardOutput(tokens, pooled if net.proj is None else pooled @ net.proj)

    def _pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.net.pool_type == "tok" else tokens[:, 1:].mean(dim=1)


def _supported(visual: nn.Module) -> VisionTransformer:
    """The tower itself; :class:`SliceError` for one whose forward pass ``ClipReward`` does not write out."""
    if not isinstance(visual, VisionTransformer):
        raise SliceError(
            f"ClipReward slices open_clip's VisionTransformer, not {type(visual).__name__}; use the family 'siglip' "
            "for a timm vision transformer, or write one (other timm and ResNet towers have none)."
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise SliceError("ClipReward reads towers that pool by CLS token or average, not by attention or not at all.")
    if visual.grid_size[0] != visual.grid_size[1] or visual.image_size[0] != visual.image_size[1]:
        raise SliceError(f"ClipReward reads square images, this tower takes {visual.image_size}.")
    return visual
