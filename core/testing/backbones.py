"""What a diffusion backbone promises beside being sliced."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from ..backbone import Backbone
from ..conditions import Condition
from ..costs import CostMeter
from ..errors import NoiseLevelError, SliceError, StitchError
from ..paths import Path
from .checks import check
from .expect import (
    expect,
    expect_close,
    expect_equal,
    expect_finite,
    expect_shape,
    global_randomness_kept,
    refuses,
)
from .sliced import PROMPTS, backward, example_input, expect_gradient, rows, whole


def _side(backbone: Backbone) -> int:
    return backbone.native_resolution // backbone.latent_factor


def _images(backbone: Backbone) -> Tensor:
    """Two random images of half the native size a side, in [0, 1]."""
    side = max(_side(backbone) // 2, 1) * backbone.latent_factor
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3)).to(backbone.device)


@check("backbone")
def declares(backbone: Backbone) -> None:
    """It says which path it lives on, what it predicts there, and the sizes of its latents and images."""
    expect(isinstance(backbone.path, Path), "path to be a noise path", type(backbone.path).__name__)
    for name in ("latent_channels", "latent_factor", "native_resolution"):
        value = getattr(backbone, name)
        expect(type(value) is int and value > 0, f"{name} to be a whole number above 0", repr(value))
    remainder = backbone.native_resolution % backbone.latent_factor
    expect(remainder == 0, "native_resolution to be a multiple of latent_factor", f"{remainder} pixels left over")
    zeros = torch.zeros(1, 1, 1, 1)
    backbone.path.interpret(backbone.prediction, zeros, zeros, torch.tensor([0.5]))


@check("backbone")
def predicts_latents(backbone: Backbone) -> None:
    """Its output has the shape of the latents."""
    x, condition = example_input(backbone)
    hint = "A network that also predicts a variance must drop it in exit()."
    expect_shape(whole(backbone, x, condition), tuple(x.latents.shape), "a prediction", hint)


@check("backbone", needs="rectangles")
def rectangles(backbone: Backbone) -> None:
    """Latents that are not square, in either direction, come out right at every cut."""
    side = _side(backbone)
    native, condition = example_input(backbone)
    reductions = [side // grid.shape[-1] for _, grid in backbone.features(native, condition)]
    for sides in ((side, side // 2), (side // 2, side)):
        x, condition = example_input(backbone, sides)
        for (cut, grid), reduction in zip(backbone.features(x, condition), reductions, strict=True):
            expected = tuple(-(-s // reduction) for s in sides)
            hint = "Are rows and columns swapped?"
            expect_shape(grid, (*grid.shape[:2], *expected), f"features at cut {cut} of {sides} latents", hint)
        output = whole(backbone, x, condition)
        expect_shape(output, (*output.shape[:2], *sides), f"a prediction for {sides} latents")


@check("backbone")
def chosen_states(backbone: Backbone) -> None:
    """A pass that has begun can go on with some of its samples: the sampler finishes those that it has chosen."""
    x, condition = example_input(backbone)
    chosen = torch.tensor([2, 0])
    hint = "Name the fields of the state whose tensors have no batch dimension in unbatched_state, or write map_state."
    for cut in range(backbone.depth + 1):
        state = backbone.map_state(lambda tensor: tensor[chosen], backbone.head(x, condition, cut))
        alone = backbone.head(*rows(x, condition, chosen.tolist()), cut)
        shapes = _shapes(backbone, state), _shapes(backbone, alone)
        expect(shapes[0] == shapes[1], f"tensors {shapes[1]} of two chosen samples at cut {cut}", shapes[0], hint)
    expected = whole(backbone, x, condition)[chosen]
    expect_close(backbone.resume(state, backbone.depth), expected, "the output of two chosen samples", hint)


def _shapes(backbone: Backbone, state: Any) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tuple(tensor.shape))
        return tensor

    backbone.map_state(note, state)
    return found


@check("backbone")
def reads_noise_level(backbone: Backbone) -> None:
    """The noise level reaches the network: another one gives another output."""
    x, condition = example_input(backbone)
    other = attrs.evolve(x, sigma=(x.sigma + 0.05))
    expect(
        not torch.equal(whole(backbone, x, condition), whole(backbone, other, condition)),
        "another output at another noise level",
        "the same",
        "Is x.sigma embedded on the network's own time scale?",
    )


@check("backbone")
def every_noise_level(backbone: Backbone) -> None:
    """Its output is finite at every noise level from 0, clean, to 1, pure noise."""
    x, condition = example_input(backbone)
    for sigma in (0.0, 0.5, 1.0):
        output = whole(backbone, backbone.noisy(x.latents, sigma), condition)
        expect_finite(output, f"the output at sigma {sigma:g}")


@check("backbone")
def sigmas(backbone: Backbone) -> None:
    """A sampler's noise levels, one more than steps, fall from at most 1 to 0."""
    side = _side(backbone)
    for steps in (1, 4, 28):
        levels = backbone.sigmas(steps, (side, side))
        expect_shape(levels, (steps + 1,), f"noise levels for {steps} steps")
        falls = bool((levels.diff() < 0).all())
        expect(falls, f"falling noise levels for {steps} steps", levels.tolist()[:4])
        ends = (float(levels[0]), float(levels[-1]))
        expect(ends[0] <= 1 and ends[1] == 0, "noise levels from at most 1 to 0", f"{ends[0]:g} to {ends[1]:g}")


@check("backbone", needs="prompts")
def prompts(backbone: Backbone) -> None:
    """Prompts are embedded one by one: the same prompt the same, whatever is beside it, another prompt differently."""
    together = backbone.encode_prompts(list(PROMPTS))
    expect(len(together) == len(PROMPTS), f"{len(PROMPTS)} samples for {len(PROMPTS)} prompts", len(together))
    for number, prompt in enumerate(PROMPTS):
        for name, tensor in backbone.encode_prompts([prompt]).tensors.items():
            expect_close(together[name][[number]], tensor, f"{name!r} of a prompt alone")
    alike = all(torch.equal(t[0], t[1]) for t in together.tensors.values())
    expect(not alike, "different embeddings of different prompts", "equal ones")


@check("backbone", needs="prompts")
def reads_condition(backbone: Backbone) -> None:
    """The condition reaches the network: another one gives another output."""
    x, condition = example_input(backbone)
    draw = torch.Generator().manual_seed(4)
    noise = {
        name: torch.randn(tensor.shape, generator=draw).to(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in condition.tensors.items()
    }
    outputs = [whole(backbone, x, given) for given in (condition, Condition(noise))]
    expect(not torch.equal(*outputs), "another output under another condition", "the same")


@check("backbone")
def null_condition(backbone: Backbone) -> None:
    """The null prompt is one sample, the same each time, and serves any batch."""
    null, again = (backbone.null_condition() for _ in range(2))
    sizes = {name: len(tensor) for name, tensor in null.tensors.items()}
    expect(set(sizes.values()) <= {1}, "a null condition of one sample", sizes)
    for name, tensor in null.tensors.items():
        expect_equal(again[name], tensor, f"the same {name!r} of the null condition each time")
    x, _ = example_input(backbone)
    expect_finite(whole(backbone, x, null.to(backbone.device).expand(3)), "the output under the null condition")


@check("backbone")
def one_prompt_for_all(backbone: Backbone) -> None:
    """A condition of one sample serves the whole batch."""
    x, condition = example_input(backbone)
    one = condition.index([0])
    expected = whole(backbone, x, one.expand(3))
    expect_close(whole(backbone, x, one), expected, "the output under it", "Use condition.tensors_for(batch).")


@check("backbone", needs="prompts")
def another_number_of_prompts(backbone: Backbone) -> None:
    """A condition of another number of samples than there are latents is refused, not repeated or cut."""
    x, condition = example_input(backbone)
    hint = "Use condition.tensors_for(batch), which raises it."
    refuses(lambda: whole(backbone, x, condition.index([0, 1])), StitchError, "2 prompts for 3 latents", hint)


@check("backbone")
def wrong_channels(backbone: Backbone) -> None:
    """Latents with another number of channels get one clear error that says how many are expected."""
    x, _ = example_input(backbone)
    wrong = torch.cat([x.latents, x.latents[:, :1]], dim=1)
    message = refuses(lambda: backbone.noisy(wrong, 0.5), SliceError, "latents with a channel too many")
    channels = str(backbone.latent_channels)
    expect(channels in message, f"an error that names {channels} channels", repr(message))


@check("backbone")
def wrong_noise_level(backbone: Backbone) -> None:
    """A noise level outside [0, 1], such as an integer timestep, is refused."""
    x, _ = example_input(backbone)
    for sigma in (500.0, -0.1):
        refuses(lambda s=sigma: backbone.noisy(x.latents, s), NoiseLevelError, f"sigma {sigma:g}")  # type: ignore[misc]


@check("backbone")
def autoencoder(backbone: Backbone) -> None:
    """Images become float32 latents ``latent_factor`` times smaller, and latents images as many times larger."""
    images, factor = _images(backbone), backbone.latent_factor
    latents = backbone.encode_images(images)
    sides = tuple(side // factor for side in images.shape[-2:])
    hint = "The posterior's mode alone, without its variance."
    expect_shape(latents, (2, backbone.latent_channels, *sides), "latents", hint)
    expect(latents.dtype == torch.float32, "latents in float32", latents.dtype)
    decoded = backbone.decode_latents(torch.zeros(2, backbone.latent_channels, *sides, device=backbone.device))
    expect_shape(decoded, tuple(images.shape), "decoded images")
    expect_finite(decoded, "decoded images")


@check("backbone")
def decoder_gradient(backbone: Backbone) -> None:
    """Gradients pass through the decoder to every latent."""
    side = _side(backbone)
    draw = torch.Generator().manual_seed(5)
    shape = (2, backbone.latent_channels, side, side)
    latents = torch.randn(shape, generator=draw).to(backbone.device).requires_grad_()
    with torch.enable_grad():
        backward(backbone.decode_latents(latents))
    expect_gradient(latents.grad, "at the latents, from decoded images")


@check("backbone")
def costs(backbone: Backbone) -> None:
    """Encoding, decoding and denoising are counted, a unit a sample."""
    x, condition = example_input(backbone)
    with CostMeter() as meter:
        backbone.denoise(x.latents, x.sigma, condition)
        backbone.encode_images(_images(backbone))
        backbone.decode_latents(x.latents[:1])
    expected = {"denoiser": 3, "encoder": 2, "decoder": 1}
    expect(dict(meter.passes) == expected, f"{expected} passes counted", dict(meter.passes), "Call core.count().")


@check("backbone")
def deterministic(backbone: Backbone) -> None:
    """The same images and latents give the same again."""
    x, condition = example_input(backbone)
    images = _images(backbone)
    for what, once in (
        ("latents of an image", lambda: backbone.encode_images(images)),
        ("images of a latent", lambda: backbone.decode_latents(x.latents)),
        ("output", lambda: whole(backbone, x, condition)),
    ):
        first, second = once(), once()
        expect_equal(second, first, f"the same {what} twice", "Take the posterior's mode, not a sample.")


@check("backbone")
def global_randomness(backbone: Backbone) -> None:
    """Nothing draws from, or seeds, the process's own random generator."""
    with global_randomness_kept("a pass"):
        x, condition = example_input(backbone)
        whole(backbone, x, condition)
    with global_randomness_kept("the autoencoder"):
        backbone.encode_images(_images(backbone))
        backbone.decode_latents(x.latents)
