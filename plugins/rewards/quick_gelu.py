"""QuickGELU as one node of autograd: open_clip's own keeps a tensor more for its backward pass and takes longer."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

STEEPNESS = 1.702


class _QuickGelu(torch.autograd.Function):
    """``x sigmoid(1.702 x)``, which is ``silu(1.702 x) / 1.702``: its derivative is that of SiLU at ``1.702 x``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (STEEPNESS * x).sigmoid_().mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        steep = STEEPNESS * x
        if torch.is_grad_enabled():  # a second derivative is asked for, and silu_backward has none
            gate = steep.sigmoid()
            return grad * gate * (1 + steep * (1 - gate))
        return torch.ops.aten.silu_backward(grad, steep)


class QuickGeluInOne(QuickGELU):
    """open_clip's activation, to the last bit, with one tensor kept for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGelu.apply(x)


def take_quick_gelu_in_one(tower: nn.Module) -> None:
    """Put :class:`QuickGeluInOne` in the place of every open_clip ``QuickGELU`` of ``tower``."""
    for module in tower.modules():
        for name, child in module.named_children():
            if type(child) is QuickGELU:
                setattr(module, name, QuickGeluInOne())
