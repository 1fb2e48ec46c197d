"""Attention's backward pass in products: the gradients of the formula itself, and only where torch's are slow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import families
from stitchvm.core import attention, seeded_noise
from stitchvm.core.attention import AttentionInProducts, attention_backward, gradient_in

ROUNDING = 0.01
"""Relative to the norm: bfloat16 has 8 bits, a relative error of 1/256 in every number that is kept."""


def drawn(queries: int, keys: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Gradient, queries, keys and values of 2 samples and 3 heads, in the layout of networks: tokens before heads."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 3, 16, generator=draw).to(dtype).transpose(1, 2) for n in (queries, queries, keys, keys)]


def by_formula(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, ...]:
    """In float64, by autograd."""
    grad, *inputs = (tensor.detach().double() for tensor in (grad, query, key, value))
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    return torch.autograd.grad((scale * q @ k.mT).softmax(-1) @ v, (q, k, v), grad)


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert (mine.double() - other).norm() < ROUNDING * other.norm()


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("at_once", [1, 130, 2**22])
def test_it_gives_the_gradients_of_the_formula(scale, at_once, monkeypatch):
    """However many heads are taken at once: one, two (of six), all."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    given = drawn(7, 9)
    assert_close(attention_backward(*given, scale=scale), by_formula(*given, scale or 16**-0.5))


@pytest.fixture
def written_out(monkeypatch) -> list[torch.Size]:
    """The shapes of the queries whose backward pass torch did not take itself."""
    seen = []

    def noted(grad, query, *rest, **options):
        seen.append(query.shape)
        return attention_backward(grad, query, *rest, **options)

    monkeypatch.setattr(attention, "attention_backward", noted)
    return seen


@pytest.mark.parametrize(("options", "dtype", "taken"), [
    ({}, torch.bfloat16, True), ({"scale": 0.4}, torch.bfloat16, True), ({}, torch.float32, False),
    ({"is_causal": True}, torch.bfloat16, False), ({"attn_mask": torch.ones(9, 9).tril()}, torch.bfloat16, False),
])  # fmt: skip
def test_only_torchs_slow_kernel_is_replaced(options, dtype, taken, written_out):
    grad, *inputs = drawn(9, 9, dtype)
    options = {name: each.to(dtype) if isinstance(each, Tensor) else each for name, each in options.items()}
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    theirs = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    with AttentionInProducts():
        ours = torch.autograd.grad(out, (q, k, v), grad)
    assert bool(written_out) is taken
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other) or (taken and (mine - other).norm() < 2 * ROUNDING * other.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_through_a_backbone_is_torchs(dtype, written_out):
    network = families.mmdit()
    network.to(dtype=dtype)
    latents = seeded_noise([0, 1], (network.latent_channels, 8, 8), "cpu").requires_grad_()
    values = network.denoise(latents, torch.tensor([0.4, 0.7]), network.null_condition().expand(2)).z0.flatten(1).sum(1)
    (theirs,) = torch.autograd.grad(values.sum(), latents, retain_graph=True)
    ours = gradient_in(latents, values, dtype)
    if dtype == torch.float32:
        assert torch.equal(ours, theirs) and not written_out
    else:
        assert written_out
        assert (ours - theirs).norm() < 2 * ROUNDING * theirs.norm()
