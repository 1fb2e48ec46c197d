"""Every backbone family in bfloat16 and under ``torch.compile``, against itself in float32 and uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import families
from pipelines import KINDS
from stitchvm.core import Backbone, Head, NoisyLatent

EACH = pytest.mark.parametrize("kind", KINDS)

TOLERANCE = 0.05
"""Largest relative error of bfloat16, in the Frobenius norm, for features at every cut and for the prediction. One
rounding is 0.4 %; these networks measure at most 1.5 % in their features and 2.6 % in a prediction."""


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def _make(kind: str) -> Backbone:
    return {
        "sd3": families.mmdit,
        "flux": families.flux,
        "sd": families.unet,
        "xl": lambda: families.unet("xl"),
    }[kind]()


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


@EACH
def test_bfloat16_is_close_to_float32(kind):
    exact, half = _make(kind), _make(kind)
    half.net.bfloat16()
    x, condition = KINDS[kind].inputs(exact)
    for (cut, ours), (_, theirs) in zip(half.features(x, condition), exact.features(x, condition), strict=True):
        assert ours.dtype == torch.bfloat16
        assert _error(ours, theirs) < TOLERANCE, cut
    ours, theirs = (network.denoise(x.latents, x.sigma, condition) for network in (half, exact))
    assert ours.z0.dtype == ours.eps.dtype == torch.float32, "predictions are combined in the latents' precision"
    assert _error(ours.velocity, theirs.velocity) < TOLERANCE


@EACH
def test_a_head_compiles_into_one_graph(kind):
    """``fullgraph``: nothing in a head falls back to Python. The backend runs the graph as it is, so that what is
    tested is the tracing, and equality can be exact; code generation is torch's own affair and takes minutes."""
    head = Head(_make(kind), 3)
    x, condition = KINDS[kind].inputs(head.part)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, condition), head(x, condition))
    latents = x.latents.clone().requires_grad_()
    compiled(NoisyLatent(latents, x.sigma), condition).square().sum().backward()
    plain = x.latents.clone().requires_grad_()
    head(NoisyLatent(plain, x.sigma), condition).square().sum().backward()
    assert torch.equal(latents.grad, plain.grad)
    assert plain.grad.abs().sum() > 0
