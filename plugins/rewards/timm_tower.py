"""timm's ``VisionTransformer`` cut after any of its blocks: the tower of SigLIP and DINOv2."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stitchvm.core import RewardOutput, SliceError

from .token_tower import TokenTower, Transform


class TimmTower(TokenTower):
    """A :class:`TokenTower` over a ``VisionTransformer``; prefix tokens (none, CLS, registers) are the model's own.

    The positional embedding is of all tokens, or with ``no_embed_class`` of the patches alone: then the prefix tokens
    have theirs within themselves. The embedding is what the model itself returns: pooled by CLS token, average or
    attention.
    """

    net: VisionTransformer
    enter_modules = ("pos_embed",)

    def __init__(self, trunk: nn.Module, transform: Transform) -> None:
        net = supported(trunk)
        image_size, grid_size = net.patch_embed.img_size[0], net.patch_embed.grid_size[0]
        super().__init__(net, transform, image_size=image_size, grid_size=grid_size, prefix_count=net.num_prefix_tokens)
        self._layers = len(net.blocks)

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"blocks.{k}" for k in range(self._layers))

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("norm", "attn_pool", "fc_norm", "head_drop", "head")

    @property
    def positions(self) -> Tensor:
        table: Tensor = self.net.pos_embed[0]
        return table

    def stem(self, x: Tensor, condition: object = None) -> Tensor:
        """Patches behind the prefix tokens, with positions."""
        self.check_pixels(x)
        net = self.net
        tokens = net._pos_embed(net.patch_embed(x.to(self.dtype)))
        return net.norm_pre(net.patch_drop(tokens))

    def block(self, k: int, state: Tensor) -> Tensor:
        return self.net.blocks[k - 1](state)

    def exit(self, state: Tensor) -> RewardOutput:
        """All tokens after the last norm, and the pooled embedding that the model returns."""
        tokens = self.net.norm(state)
        return RewardOutput(tokens, self.net.forward_head(tokens))


def supported(trunk: nn.Module) -> VisionTransformer:
    """The tower itself; :class:`SliceError` for one whose forward pass is not written here."""
    tower: Any = trunk
    if type(tower) is not VisionTransformer:  # a subclass has a forward pass of its own
        raise SliceError(f"only timm's plain VisionTransformer can be cut, not {type(trunk).__name__}.")
    if tower.pos_embed is None:
        raise SliceError("this VisionTransformer has no table of absolute positions, which a stitch has to know.")
    sizes = tower.patch_embed.img_size
    if sizes[0] != sizes[1]:
        raise SliceError(f"a reward's images are square, this tower takes {tuple(sizes)}.")
    return tower
