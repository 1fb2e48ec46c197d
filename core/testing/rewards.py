"""What a reward promises beside being sliced: preprocessing, tokens, tails, a score and what it compares with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..conditions import Condition
from ..costs import CostMeter
from ..errors import ConfigError, StitchError
from ..reward import Reward, Tail
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
from .sliced import PROMPTS, backward, example_input, expect_gradient, final, leaf, whole

SIZES = ((1.0, 1.0), (0.5, 0.75), (1.5, 2.0), (2.0, 1.0))
"""Height and width of images, in the tower's own."""


def _images(reward: Reward, height: float = 1.5, width: float = 1.5, seed: int = 3) -> Tensor:
    """Three random images in [0, 1]; height and width in the tower's own."""
    sides = (round(height * reward.image_size), round(width * reward.image_size))
    return torch.rand(3, 3, *sides, generator=torch.Generator().manual_seed(seed)).to(reward.device)


def _given(reward: Reward) -> Any:
    """What ``condition`` takes, for one sample."""
    references = list(_images(reward, seed=6)[:2])
    return {"prompts": PROMPTS[:1], "images": references, "nothing": None}[reward.condition_kind]


def _condition(reward: Reward) -> Condition:
    return reward.condition(_given(reward)).to(reward.device)


@check("reward")
def declares(reward: Reward) -> None:
    """It says how large its images and its patch grid are, how many prefix tokens there are, what it compares with."""
    for name, least in (("image_size", 1), ("grid_size", 1), ("prefix_count", 0)):
        value = getattr(reward, name)
        expect(type(value) is int and value >= least, f"{name} to be a whole number from {least}", repr(value))
    kinds = ("prompts", "images", "nothing")
    expect(reward.condition_kind in kinds, f"condition_kind to be one of {', '.join(kinds)}", reward.condition_kind)
    fits = reward.image_size % reward.grid_size == 0 or reward.image_size > reward.grid_size
    expect(fits, "a patch grid no larger than the image", f"{reward.grid_size} patches on {reward.image_size} pixels")


@check("reward")
def preprocess(reward: Reward) -> None:
    """Images of any size and shape become the tower's own pixels, finite."""
    side = reward.image_size
    for height, width in SIZES:
        images = _images(reward, height, width)
        pixels = reward.preprocess(images)
        expect_shape(pixels, (3, 3, side, side), f"pixels of {list(images.shape)} images")
        expect_finite(pixels, "preprocessed pixels")


@check("reward")
def preprocess_gradient(reward: Reward) -> None:
    """Gradients pass through the preprocessing to every image, square or not."""
    with torch.enable_grad():
        for height, width in SIZES:
            images = _images(reward, height, width).requires_grad_()
            backward(reward.preprocess(images))
            expect_gradient(images.grad, f"at {list(images.shape)} images, through preprocess")


@check("reward")
def wrong_images(reward: Reward) -> None:
    """Something that is no batch of colour images gets one clear error."""
    images = _images(reward)
    for wrong in (images[:, :1], images[0]):
        what = f"images of shape {list(wrong.shape)}"
        refuses(lambda given=wrong: reward.preprocess(given), StitchError, what)  # type: ignore[misc]


@check("reward")
def clamped(reward: Reward) -> None:
    """``judge`` clamps images to [0, 1], as decoded latents leave that range."""
    wild = _images(reward) * 3 - 1
    expected = final(reward.judge(wild.clamp(0, 1)))
    expect_close(final(reward.judge(wild)), expected, "the embedding of the clamped images")


@check("reward")
def costs(reward: Reward) -> None:
    """Judging images is counted, a unit an image."""
    with CostMeter() as meter:
        reward.judge(_images(reward))
    expect(dict(meter.passes) == {"reward": 3}, "3 passes of kind 'reward'", dict(meter.passes), "Call core.count().")


@check("reward")
def token_layout(reward: Reward) -> None:
    """At every cut a state shows its patches as a square grid and its prefix tokens, of one width."""
    x, condition = example_input(reward)
    for cut in range(reward.depth + 1):
        state = reward.head(x, condition, cut)
        grid = reward.grid(state)
        expect_shape(grid, (3, grid.shape[1], reward.grid_size, reward.grid_size), f"patches at cut {cut}")
        expected = (3, reward.prefix_count, grid.shape[1])
        expect_shape(reward.prefix(state), expected, f"prefix tokens at cut {cut}", "Is prefix_count right?")


@check("reward")
def enter(reward: Reward) -> None:
    """A state can be taken apart into patches and prefix tokens and entered again, at every cut, bit for bit."""
    x, condition = example_input(reward)
    hint = "Features at a cut carry their positions already: enter() must not add them unasked."
    for cut in range(reward.depth + 1):
        state = reward.head(x[:1], condition, cut)
        grid, prefix = reward.grid(state).clone(), reward.prefix(state)[0].clone()
        expected = final(reward.resume(state, cut))
        entered = reward.enter(grid, prefix)
        expect_equal(reward.grid(entered), grid, f"the same patches at cut {cut}", hint)
        expect_equal(reward.prefix(entered)[0], prefix, f"the same prefix tokens at cut {cut}", hint)
        expect_equal(final(reward.resume(entered, cut)), expected, f"the same embedding from cut {cut}", hint)


@check("reward")
def tails(reward: Reward) -> None:
    """A tail cut out before any block computes alone what the whole reward computes from there, bit for bit."""
    x, condition = example_input(reward)
    hint = "Is a module that a block or the exit uses missing from block_modules, block_parts or exit_modules?"
    for j in range(1, reward.depth + 1):
        state = reward.head(x[:1], condition, j - 1)
        grid, prefix = reward.grid(state).clone(), reward.prefix(state)[0].clone()
        expected = reward.resume(reward.enter(grid, prefix), j - 1)
        output = Tail(reward, j, prefix)(grid)
        expect_equal(
            output.embedding, expected.embedding, f"the whole's embedding from the tail before block {j}", hint
        )
        if expected.score is not None:
            expect_equal(output.score, expected.score, f"the whole's score from the tail before block {j}", hint)


@check("reward", needs="positions")
def positions(reward: Reward) -> None:
    """With ``positions`` a tail adds the same positional embedding to every sample's tokens."""
    x, condition = example_input(reward)
    state = reward.head(x, condition, 0)
    grid, prefix = reward.grid(state).clone(), reward.prefix(state)[0].clone()
    part = Tail(reward, 1, prefix, positions=True).part
    added = part.grid(part.enter(grid, prefix, positions=True)) - part.grid(part.enter(grid, prefix))
    expect(bool((added != 0).any()), "positions to be added to the patches", "none", "Is enter_modules complete?")
    expect_close(added, added[:1].expand_as(added), "the same positions in every sample")


@check("reward")
def output(reward: Reward) -> None:
    """The tower ends in tokens ``[B, N, C]``, an embedding ``[B, D]``, and a score exactly if it compares with
    nothing."""
    x, condition = example_input(reward)
    found = reward.resume(reward.head(x, condition, 0), 0)
    expect(found.tokens.ndim == 3 and len(found.tokens) == 3, "tokens [3, N, C]", list(found.tokens.shape))
    expect(found.embedding.ndim == 2 and len(found.embedding) == 3, "an embedding [3, D]", list(found.embedding.shape))
    if reward.condition_kind == "nothing":
        expect_shape(found.score, (3,), "the output's score of a reward that compares with nothing")
    else:
        hint = "A score that needs a condition comes from score()."
        expect(found.score is None, f"no score in the output: it compares with {reward.condition_kind}", "one", hint)


@check("reward")
def score(reward: Reward) -> None:
    """One finite score an image, the same against a condition of one sample and that one expanded to the batch."""
    x, condition = example_input(reward)
    found, one = reward.resume(reward.head(x, condition, 0), 0), _condition(reward)
    scores = reward.score(found, one)
    expect_shape(scores, (3,), "scores of 3 images")
    expect_finite(scores, "scores")
    expect_close(reward.score(found, one.expand(3)), scores, "the scores against the condition of one sample")


@check("reward")
def score_gradient(reward: Reward) -> None:
    """Gradients reach every sample's pixels from its score."""
    x, _ = example_input(reward)
    with torch.enable_grad():
        given, tensor = leaf(x)
        found = reward.resume(reward.head(given, None, 0), 0)
        backward(reward.score(found, _condition(reward)))
    expect_gradient(tensor.grad, "at the pixels, from the score")


@check("reward")
def condition(reward: Reward) -> None:
    """A missing condition, and one that it does not read, is an error; a ready one is taken as it is."""
    if reward.condition_kind == "nothing":
        refuses(lambda: reward.condition(PROMPTS[:1]), ConfigError, "prompts that nothing is compared with")
    else:
        refuses(lambda: reward.condition(None), ConfigError, f"no condition ({reward.condition_kind} are needed)")
    if reward.condition_kind == "images":
        refuses(lambda: reward.condition(PROMPTS[:1]), ConfigError, "prompts instead of reference images")
    ready = _condition(reward)
    again = reward.condition(ready)
    expect(set(again.tensors) == set(ready.tensors), "a ready condition as it is", sorted(again.tensors))
    for name, tensor in ready.tensors.items():
        expect_equal(again[name], tensor, f"{name!r} of a ready condition as it is")


@check("reward")
def wrong_condition(reward: Reward) -> None:
    """``score`` refuses a condition that is not its own: an empty one, or one that nothing is compared with."""
    x, _ = example_input(reward)
    found = reward.resume(reward.head(x, None, 0), 0)
    foreign = Condition({"foreign": torch.zeros(1, 2, device=reward.device)})
    refuses(lambda: reward.score(found, foreign), ConfigError, "a condition of another reward")
    if reward.condition_kind != "nothing":
        refuses(lambda: reward.score(found, Condition()), ConfigError, "an empty condition")


@check("reward", only=("prompts",))
def text(reward: Reward) -> None:
    """The text side needs no image: one embedding a prompt, the same whatever is beside it, without gradient."""
    with torch.enable_grad():
        together = reward.encode_prompts(list(PROMPTS))
    expect(len(together) == len(PROMPTS), f"{len(PROMPTS)} samples for {len(PROMPTS)} prompts", len(together))
    for name, tensor in together.tensors.items():
        expect(not tensor.requires_grad, f"{name!r} without gradient", "one", "Encode under torch.no_grad().")
    for number, prompt in enumerate(PROMPTS):
        for name, tensor in reward.encode_prompts([prompt]).tensors.items():
            expect_close(together[name][[number]], tensor, f"{name!r} of a prompt alone")
    alike = all(torch.equal(t[0], t[1]) for t in together.tensors.values())
    expect(not alike, "different embeddings of different prompts", "equal ones")


@check("reward", only=("images", "nothing"))
def no_text(reward: Reward) -> None:
    """A reward that reads no prompts says so when it is asked to encode some."""
    refuses(lambda: reward.encode_prompts(PROMPTS[:1]), ConfigError, "prompts that it does not read")


@check("reward", only=("prompts", "images"))
def reads_condition(reward: Reward) -> None:
    """What an image is compared with changes its score."""
    x, _ = example_input(reward)
    found, one = reward.resume(reward.head(x, None, 0), 0), _condition(reward)
    draw = torch.Generator().manual_seed(4)
    other = {name: torch.randn(tensor.shape, generator=draw).to(tensor) for name, tensor in one.tensors.items()}
    scores = [reward.score(found, given) for given in (one, Condition(other))]
    expect(not torch.equal(*scores), "other scores against another condition", "the same")


@check("reward")
def deterministic(reward: Reward) -> None:
    """The same images give the same again."""
    images = _images(reward)
    first, second = (final(reward.judge(images)) for _ in range(2))
    expect_equal(second, first, "the same embedding twice")


@check("reward")
def global_randomness(reward: Reward) -> None:
    """Nothing draws from, or seeds, the process's own random generator."""
    x, given = example_input(reward)
    with global_randomness_kept("a pass"):
        whole(reward, x, given)
        reward.preprocess(_images(reward))
        _condition(reward)
