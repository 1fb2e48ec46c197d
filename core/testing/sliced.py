"""What every sliced network promises, backbone or reward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone, NoisyLatent
from ..reward import RewardOutput
from ..slicing import LATENT, Head, Sliced
from .checks import check
from .expect import expect, expect_close, expect_equal, expect_finite

PROMPTS = ["a red circle", "two blue stars left of a cat", "a dog"]
BFLOAT16 = 0.1
"""Largest relative error of a pass in bfloat16, in the Frobenius norm; one rounding is 0.004."""


def example_input(network: Any, sides: tuple[int, int] | None = None, seed: int = 1) -> tuple[Any, Any]:
    """A random batch of three with noise levels and prompts of their own; ``sides`` of a backbone's latents."""
    draw = torch.Generator().manual_seed(seed)
    if not isinstance(network, Backbone):
        side = network.image_size
        return torch.randn(3, 3, side, side, generator=draw).to(network.device), None
    side = network.native_resolution // network.latent_factor
    latents = torch.randn(3, network.latent_channels, *(sides or (side, side)), generator=draw)
    condition = network.encode_prompts(list(PROMPTS)).to(network.device)
    return network.noisy(latents.to(network.device), torch.tensor([0.1, 0.45, 0.9])), condition


def final(output: Any) -> Tensor:
    """A backbone's prediction or a reward's embedding."""
    tensor: Tensor = output.embedding if isinstance(output, RewardOutput) else output
    return tensor


def whole(network: Sliced, x: Any, condition: Any) -> Tensor:
    """The full pass."""
    return final(network.exit(network.run(network.stem(x, condition), 0, network.depth)))


def rows(x: Any, condition: Any, chosen: list[int]) -> tuple[Any, Any]:
    """The chosen samples of an input."""
    if isinstance(x, NoisyLatent):
        return NoisyLatent(x.latents[chosen], x.sigma[chosen]), condition.index(chosen)
    return x[chosen], condition


def leaf(x: Any) -> tuple[Any, Tensor]:
    """The input with a tensor that collects its gradient."""
    if isinstance(x, NoisyLatent):
        tensor = x.latents.clone().requires_grad_()
        return NoisyLatent(tensor, x.sigma), tensor
    tensor = x.clone().requires_grad_()
    return tensor, tensor


def replica(network: Sliced) -> Sliced:
    """A copy whose ``net`` may be changed; what hangs on ``companions`` is shared."""
    return copy.deepcopy(network, {id(network.companions): network.companions})


def backward(output: Tensor) -> None:
    """Gradients of the sum of squares; none where the output has lost them, which is the check's to say."""
    if output.requires_grad:
        output.square().sum().backward()


def expect_gradient(gradient: Tensor | None, where: str) -> None:
    """A finite gradient in every sample."""
    expect(gradient is not None, f"a gradient {where}", "none", "Is something detached, or under no_grad?")
    assert gradient is not None
    expect_finite(gradient, f"the gradient {where}")
    reached = gradient.flatten(1).abs().sum(1) > 0
    expect(bool(reached.all()), f"a gradient {where} in every sample", f"zeros in {int((~reached).sum())} of them")


@check("backbone", "reward")
def frozen(network: Sliced) -> None:
    """It comes frozen and in eval mode."""
    training = [name or "itself" for name, module in network.named_modules() if module.training]
    expect(not training, "every module in eval mode", f"{', '.join(training[:3])} in training mode", "Call .eval().")
    loose = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    hint = "Call .requires_grad_(False)."
    expect(not loose, "no parameter that asks for a gradient", f"{', '.join(loose[:3])}", hint)


@check("backbone", "reward")
def all_named(network: Sliced) -> None:
    """Stem, blocks and exit together name every tensor of ``net``, and nothing that is not there."""
    parts = (*network.stem_modules, *(p for each in network.block_parts for p in each), *network.exit_modules)
    names = set(network.net.state_dict())
    nameless = sorted(name for name in names if not _below(name, parts))
    expect(not nameless, "every tensor to belong to a named part", f"{', '.join(nameless[:3])} in none")
    own = {name for name, _ in network.net.named_modules()} | {name for name, _ in network.net.named_parameters()}
    missing = [path for path in network.block_modules if path not in own]
    expect(not missing, "every block to be a module of net", f"no {', '.join(missing[:3])}")


@check("backbone", "reward")
def companions_apart(network: Sliced) -> None:
    """What is not cut (an autoencoder, text encoders) hangs outside the module tree: a head does not take it along."""
    names = (name for name, _ in (*network.named_parameters(), *network.named_buffers()))
    strays = [name for name in names if not name.startswith("net.")]
    hint = "Put modules into a dictionary or an object on self.companions: a bare module would become a sub-module."
    expect(not strays, "every tensor of the module to be in net", ", ".join(strays[:3]), hint)


def _below(name: str, paths: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)


@check("backbone", "reward", needs="upstream")
def upstream(network: Sliced) -> None:
    """Stem, blocks and exit in a row equal the upstream model's own forward, bit for bit in float32."""
    x, condition = example_input(network)
    hint = "Compare block by block with the upstream forward: order of the outputs, skipped norms, time scale."
    expect_equal(whole(network, x, condition), network.upstream(x, condition), "the upstream model's output", hint)


@check("backbone", "reward")
def resume(network: Sliced) -> None:
    """A pass begun at any cut can be finished later, whatever was run in between, bit for bit."""
    x, condition = example_input(network)
    other, text = rows(*example_input(network, seed=2), [2, 0, 1])
    expected = whole(network, x, condition)
    for cut in range(network.depth + 1):
        state = network.head(x, condition, cut)
        whole(network, other, text)
        found = final(network.resume(state, cut))
        hint = "Everything a later block reads must be in the state, not on the object."
        expect_equal(found, expected, f"resume(head(x, {cut}), {cut}) to be the whole pass", hint)


@check("backbone", "reward")
def states_kept(network: Sliced) -> None:
    """A block leaves the state it was given as it was, so that one state can be run on more than once."""
    x, condition = example_input(network)
    for cut in range(network.depth + 1):
        state = network.head(x, condition, cut)
        first, second = (final(network.resume(state, cut)) for _ in range(2))
        expect_equal(second, first, f"the same result from the state at cut {cut} twice", "Is something done in place?")


@check("backbone", "reward")
def heads(network: Sliced) -> None:
    """A head cut out after any block computes alone what the whole network computes there, bit for bit."""
    x, condition = example_input(network)
    grids = [grid.clone() for _, grid in network.features(x, condition)]
    hint = "Is a module that a block or the stem uses missing from stem_modules, block_modules or block_parts?"
    for cut, grid in enumerate(grids):
        expect_equal(Head(network, cut)(x, condition), grid, f"the features at cut {cut}", hint)
    expect_equal(Head(network, LATENT)(x, condition), network.input_grid(x), "the input itself at the cut before all")


@check("backbone", "reward")
def heads_own(network: Sliced) -> None:
    """A head owns nothing of what comes after its cut, and never shrinks from cut to cut."""
    sizes = []
    for cut in range(network.depth + 1):
        names = set(Head(network, cut).part.net.state_dict())
        later = (*(p for parts in network.block_parts[cut:] for p in parts), *network.exit_modules)
        surplus = sorted(name for name in names if _below(name, later))
        expect(not surplus, f"a head at cut {cut} without later parts", ", ".join(surplus[:3]))
        sizes.append(len(names))
    expect(sizes == sorted(sizes), "heads that never shrink", f"{sizes} tensors from cut to cut")


@check("backbone", "reward")
def feature_info(network: Sliced) -> None:
    """``feature_info``, from a pass without memory on the meta device, says what every cut really hands out."""
    x, condition = example_input(network)
    side = network.input_grid(x).shape[-1]
    for entry, (cut, grid) in zip(network.feature_info(), network.features(x, condition), strict=True):
        found = (cut, grid.shape[1], side // grid.shape[-1])
        expected = (entry.cut, entry.num_chs, entry.reduction)
        hint = "Does example() have the native size?"
        expect(found == expected, f"cut, channels and reduction {expected}, as feature_info says", found, hint)


@check("backbone", "reward")
def gradient(network: Sliced) -> None:
    """Gradients reach every sample of the input from every cut and from the output."""
    x, condition = example_input(network)
    with torch.enable_grad():
        for cut in range(network.depth + 1):
            given, tensor = leaf(x)
            backward(network.grid(network.head(given, condition, cut)))
            expect_gradient(tensor.grad, f"at the input, from cut {cut}")
        given, tensor = leaf(x)
        backward(whole(network, given, condition))
    expect_gradient(tensor.grad, "at the input, from the output")


@check("backbone", "reward", needs="checkpointing")
def checkpointing(network: Sliced) -> None:
    """With gradient checkpointing output and gradient are the same."""
    x, condition = example_input(network)
    part, found = replica(network), []
    with torch.enable_grad():
        for switch in (False, True):
            part.gradient_checkpointing = switch
            given, tensor = leaf(x)
            output = whole(part, given, condition)
            backward(output)
            found.append((output.detach(), torch.zeros_like(tensor) if tensor.grad is None else tensor.grad))
    (plain, slope), (output, same) = found
    expect_close(output, plain, "the output without checkpointing")
    expect_close(same, slope, "the gradient without checkpointing", "A block must be a function of its state.")


@check("backbone", "reward", needs="bfloat16")
def bfloat16(network: Sliced) -> None:
    """In bfloat16 every cut and the output are finite and close to float32."""
    x, condition = example_input(network)
    half = replica(network)
    half.net.bfloat16()
    hint = "Cast what enters the stem to self.dtype."
    for (cut, ours), (_, theirs) in zip(half.features(x, condition), network.features(x, condition), strict=True):
        _expect_near(ours, theirs, f"the features at cut {cut}", hint)
    _expect_near(whole(half, x, condition), whole(network, x, condition), "the output", hint)


def _expect_near(ours: Tensor, theirs: Tensor, what: str, hint: str) -> None:
    expect_finite(ours, f"{what} in bfloat16")
    error = float((ours.float() - theirs).norm() / theirs.norm())
    expect(error < BFLOAT16, f"{what} in bfloat16 within {BFLOAT16:.0%} of float32", f"{error:.1%}", hint)


@check("backbone", "reward")
def samples_apart(network: Sliced) -> None:
    """Every sample is on its own: alone or in another order, it comes out as in the batch."""
    x, condition = example_input(network)
    expected = whole(network, x, condition)
    for chosen in ([2, 0, 1], [1]):
        found = whole(network, *rows(x, condition, chosen))
        hint = "Is one sample's noise level, prompt or statistic used for all?"
        expect_close(found, expected[chosen], f"samples {chosen} of the batch's result", hint)


@check("backbone", "reward")
def orientation(network: Sliced) -> None:
    """What changes in one corner of the input changes the features of that corner most, after the stem."""
    x, condition = example_input(network)
    pixels = network.input_grid(x)
    before = network.grid(network.head(x, condition, 0))
    for bottom, right in ((False, True), (True, False)):
        changed = pixels.clone()
        _corner(changed, bottom, right, 4).add_(2.0)
        other = NoisyLatent(changed, x.sigma) if isinstance(x, NoisyLatent) else changed
        moved = (network.grid(network.head(other, condition, 0)) - before).square().sum(1)
        share = float(_corner(moved, bottom, right, 2).sum() / moved.sum())
        where = f"the {'bottom' if bottom else 'top'} {'right' if right else 'left'} corner"
        hint = "Are rows and columns swapped, or is something mirrored?"
        expect(share > 0.5, f"most of the change in {where}, where the input changed", f"{share:.0%}", hint)


def _corner(tensor: Tensor, bottom: bool, right: bool, parts: int) -> Tensor:
    """A view of one corner, ``1 / parts`` of each side."""
    height, width = (-(-side // parts) for side in tensor.shape[-2:])
    part = tensor[..., -height:, :] if bottom else tensor[..., :height, :]
    return part[..., -width:] if right else part[..., :width]
