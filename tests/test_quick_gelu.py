"""QuickGELU in one node: open_clip's own numbers, its derivatives, and what it keeps for the backward pass."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

import families
from stitchvm.plugins.rewards.quick_gelu import QuickGeluInOne

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def drawn(dtype: torch.dtype) -> Tensor:
    """Both signs, tails and what lies between."""
    return (4 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def gradient(activation: nn.Module, x: Tensor, passed: Tensor, **options: bool) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(activation(x), x, passed, **options)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_numbers_are_open_clips_to_the_last_bit(dtype):
    x = drawn(dtype)
    assert torch.equal(QuickGeluInOne()(x), QuickGELU()(x))
    assert torch.equal(x, drawn(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_gradient_is_the_formulas(dtype):
    """Of open_clip's own in float64; rounding may add a few times the relative error of one number."""
    x, passed = drawn(dtype), torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = gradient(QuickGeluInOne(), x, passed), gradient(QuickGELU(), x.double(), passed.double())
    assert ours.dtype == dtype
    assert (ours.double() - theirs).norm() < 3 * torch.finfo(dtype).eps * theirs.norm()


def test_it_can_be_differentiated_twice():
    x = drawn(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(QuickGeluInOne(), x)
    assert torch.autograd.gradgradcheck(QuickGeluInOne(), x)
    once = gradient(QuickGeluInOne(), x, torch.ones_like(x), create_graph=True)
    torch.testing.assert_close(once, gradient(QuickGELU(), x, torch.ones_like(x)))


@pytest.mark.parametrize(("activation", "kept"), [(QuickGeluInOne(), 1), (QuickGELU(), 2)])
def test_it_keeps_its_input_alone(activation, kept):
    """However often a tensor is kept, it is there once."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda it: it):
        activation(drawn(torch.float32).requires_grad_())
    assert len({tensor.data_ptr() for tensor in seen if tensor.shape == (3, 50)}) == kept


@pytest.mark.parametrize("quick", [True, False])
def test_a_clip_has_it_in_the_place_of_quick_gelu_alone(quick):
    reward = families.clip(quick_gelu=quick)
    kinds = {type(block.mlp.gelu) for block in reward.net.transformer.resblocks}
    assert kinds == {QuickGeluInOne if quick else nn.GELU}


def test_a_clip_passes_back_what_open_clips_own_does():
    torch.manual_seed(0)
    # frozen as ours is: on some processors other kernels run where weights want a gradient
    theirs = open_clip.CLIP(**families.clip_architecture()).visual.eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours = families.clip(seed=0)
    embedding = ours.resume(ours.head(pixels, None, 0), 0).embedding
    assert torch.equal(embedding, theirs(pixels))
    passed = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2))
    (mine,), (other,) = (torch.autograd.grad(out, pixels, passed) for out in (embedding, theirs(pixels)))
    torch.testing.assert_close(mine, other)
