"""The Gaussian world of the conformance kit, and the value model that is exact in it."""

from __future__ import annotations

import torch

from stitchvm.core import Head, StitchedValue, Tail, name_of
from stitchvm.core.branch import Branch
from stitchvm.core.layer import StitchingLayer
from stitchvm.core.testing.gaussian import (
    CONTRAST,
    ExactValue,
    GaussianBackbone,
    LinearReward,
    MomentReward,
    QuadraticReward,
)

__all__ = [
    "CONTRAST",
    "ExactValue",
    "GaussianBackbone",
    "LinearReward",
    "MomentReward",
    "QuadraticReward",
    "exact_stitched",
]


def exact_stitched(backbone: GaussianBackbone, reward: MomentReward) -> StitchedValue:
    """A stitched value model whose linear layer is the exact map: ``z <- E[z0]``, ``z^2 <- E[z0]^2 + Var[z0]``."""
    c = backbone.latent_channels
    weight = torch.zeros(2 * c, 4 * c + 2)
    weight[:c, c : 2 * c] = weight[c:, 3 * c : 4 * c] = torch.eye(c)
    weight[c:, -1] = 1
    layer = StitchingLayer(4 * c + 2, 2 * c, reward.grid_size)
    layer.load_map(weight, torch.zeros(2 * c))
    branch = Branch(layer, Tail(reward, 1, torch.zeros(1, 2 * c)))
    name = name_of(reward)
    return StitchedValue(Head(backbone, 2), {name: branch}, backbone.null_condition(), rewards={name: reward})
