"""Gradients through attention on CPUs in bfloat16: its backward pass written out in matrix products.

torch's own (2.14) leaves much of the matrix instructions of a CPU that has them unused. The products it is made of, a
few heads at a time, take less time (``benchmarks/attention_backward.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TORCHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

SCORES_AT_ONCE = 2**21
"""Of so many queries and keys at once, few enough for what is computed of them to stay in a processor's cache."""


def gradient_in(latents: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, C, h, w]``: the gradient of the sum of ``values [B]`` in ``latents``, through networks of ``dtype``."""
    written_out = latents.device.type == "cpu" and dtype == torch.bfloat16
    with AttentionInProducts() if written_out else nullcontext():
        (found,) = torch.autograd.grad(values.sum(), latents)
    return found


class AttentionInProducts(TorchDispatchMode):
    """While it is entered, bfloat16 attention on the CPU without mask or dropout has its backward pass taken by
    :func:`attention_backward`; everything else is left to torch."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func is TORCHS and _plain(*args, **kwargs):
            return attention_backward(*args[:4], scale=kwargs.get("scale"))
        return func(*args, **kwargs)


def _plain(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout: float,
    causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> bool:  # fmt: skip
    alike = query.dtype == torch.bfloat16 and query.shape[:2] == key.shape[:2]
    return alike and attn_mask is None and dropout == 0 and not causal


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``softmax(scale query key^T) value`` passes back of ``grad [B, H, n, d]`` to ``query [B, H, n, c]``, ``key
    [B, H, m, c]`` and ``value [B, H, m, d]``; ``scale`` is ``c^-1/2`` by default."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = (query * scale, key, value)
    out, *heads = (tensor.flatten(0, 1).contiguous() for tensor in (grad, *inputs))
    found = [torch.empty_like(tensor) for tensor in heads]
    each = min(max(SCORES_AT_ONCE // (query.shape[2] * key.shape[2]), 1), len(out))
    scratch = [query.new_empty(each, query.shape[2], key.shape[2]) for _ in range(3)]
    for start in range(0, len(out), each):
        few = slice(start, start + each)
        g, q, k, v = (tensor[few] for tensor in (out, *heads))
        into, weights, scores = (tensor[: len(q)] for tensor in scratch)
        torch.softmax(torch.bmm(q, k.mT, out=into), -1, out=weights)
        torch.bmm(g, v.mT, out=into)
        torch.ops.aten._softmax_backward_data.out(into, weights, -1, weights.dtype, grad_input=scores)
        for passed, (left, right) in zip(found, ((scores, k), (scores.mT, q), (weights.mT, g)), strict=True):
            torch.bmm(left, right, out=passed[few])
    found[0].mul_(scale)
    return tuple(each.view_as(tensor) for each, tensor in zip(found, inputs, strict=True))  # type: ignore[return-value]
