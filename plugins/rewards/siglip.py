"""SigLIP and SigLIP 2: open_clip models whose image tower is timm's ``VisionTransformer`` with attention pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from stitchvm.core import ConfigError, SliceError

from .openclip import OpenClipReward, TextTower
from .timm_tower import TimmTower, supported
from .token_tower import Transform


class SiglipReward(OpenClipReward, TimmTower):
    """A :class:`Reward` over the trunk of open_clip's ``TimmModel``; its score is the cosine with the prompt.

    There are no prefix tokens: attention pooling reads the patches alone. ``net`` is the trunk. An architecture may
    bring ``timm_args``, arguments of ``timm.create_model`` that open_clip's configuration has no place for: how a twin
    is shrunk.
    """

    def __init__(self, visual: nn.Module, transform: Transform, text: TextTower | None = None) -> None:
        super().__init__(_trunk(visual), transform)
        self.companions = text

    @classmethod
    def check_tower(cls, visual: nn.Module) -> int:
        side, stated = supported(_trunk(visual)).patch_embed.img_size[0], getattr(visual, "image_size", None)
        if stated != (side, side):  # open_clip would go on with the tower's own
            raise SliceError(f"vision_cfg says {stated} pixels, but its timm model reads {side}.")
        return int(side)

    @classmethod
    def make_model(cls, architecture: Mapping[str, Any]) -> Any:
        args = architecture.get("timm_args")
        if not args:
            return super().make_model(architecture)
        vision = architecture["vision_cfg"]
        # the text side beside the smallest tower there is, which then makes room for the shrunk one
        stand_in = {"image_size": 1, "patch_size": 1, "layers": 1, "width": 1, "head_width": 1}
        model = super().make_model({**architecture, "vision_cfg": stand_in})
        model.visual = _shrunk(vision, architecture["embed_dim"], args)
        return model


def _shrunk(vision: Mapping[str, Any], embed_dim: int, args: Mapping[str, Any]) -> TimmModel:
    """open_clip's ``TimmModel`` around a trunk that ``timm.create_model`` was told more about."""
    name, pool, proj = vision["timm_model_name"], vision["timm_pool"], vision["timm_proj"]
    with torch.device("meta"):  # the named size, only for the shell around it
        visual = TimmModel(name, embed_dim, vision["image_size"], pool=pool, proj=proj)
    try:
        visual.trunk = timm.create_model(name, num_classes=0, global_pool=pool, **args)
    except TypeError as error:
        raise ConfigError(f"timm_args: {error}.") from error
    return visual


def _trunk(visual: nn.Module) -> nn.Module:
    """The timm model inside an open_clip tower that adds nothing to it."""
    if not isinstance(visual, TimmModel) or len(visual.head):
        raise SliceError(
            f"SiglipReward reads open_clip's TimmModel without a projection of its own, not {type(visual).__name__}; "
            "use the family 'clip' for open_clip's VisionTransformer."
        )
    trunk: nn.Module = visual.trunk
    return trunk
