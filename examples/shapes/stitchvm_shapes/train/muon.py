"""Muon in float32: momentum whose matrices are orthogonalised, for the hidden layers (Jordan et al., 2024).

torch.optim.Muon orthogonalises in bfloat16, which ordinary processors emulate slowly. Here matrices of one shape are
done in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn

#: Coefficients of the quintic Newton-Schulz iteration.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of a batch [K, m, n]."""
    a, b, c = _QUINTIC
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Learning rate and weight decay mean what they do for AdamW: updates are scaled to the same root mean square."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # A convolution is a matrix from patches to channels.
                    by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for parameters in by_shape.values():
                self._step_alike(parameters, group)
        return loss

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, float]) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
        matrices = orthogonalise(torch.stack([update.flatten(1) for update in updates]))
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        for parameter, update in zip(parameters, matrices, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def split_parameters(
    modules: Iterable[nn.Module], exclude: Callable[[str], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden matrices, for Muon, and all other parameters, for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            (matrices if parameter.ndim in (2, 4) and not exclude(name) else others).append(parameter)
    return matrices, others
