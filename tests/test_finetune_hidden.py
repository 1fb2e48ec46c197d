"""Stage 2 held to the reward's hidden states, and moved by Muon."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest
import torch

from families import clip, mmdit
from stitchvm import core
from stitchvm.core.files import read_tensors, write_tensors
from stitchvm.core.images import open_images
from stitchvm.core.stitching.beginnings import initial_value
from stitchvm.core.stitching.examples import (
    Examples,
    GenerationSettings,
    Latents,
    build_examples,
    from_images,
    from_samples,
)
from stitchvm.core.stitching.finetune import finetune
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from stitchvm.core.stitching.objectives import hidden_loss
from stitchvm.core.stitching.optimisers import Optimisers
from test_training_processes import assert_close, start_two

RECIPE = FinetuneSettings(
    steps=12,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=2,
    hidden_weight=1.0,
    optimiser="muon",
    balance_levels=True,
    checkpoint_every=5,
)
IMAGES = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(24)]


def pair() -> core.StitchedValue:
    backbone, reward = mmdit(), clip()
    found = core.search(backbone, reward, images=IMAGES, cuts=(2,), blocks=(2,), probes=24, progress=False)
    return initial_value(backbone, reward, found, found.best)


def cache(
    folder: Path, value: core.StitchedValue, *, latents: Latents | None = None, keep_images: bool = True
) -> Examples:
    latents = latents or from_images(mmdit(), open_images(IMAGES), len(IMAGES), 32, 8)
    rewards = {value.names[0]: value.reward(value.names[0])}
    return build_examples(folder, latents, rewards, {}, len(IMAGES), label="x", progress=False, keep_images=keep_images)


def test_hidden_states_are_the_towers_own_after_every_block() -> None:
    reward, pixels = clip(), torch.rand(3, 3, 28, 28)
    state = reward.head(pixels, None, 1)
    last, hidden = reward.hidden_states(state, 1)
    outputs: list[torch.Tensor] = []
    for block in reward.net.transformer.resblocks:
        block.register_forward_hook(lambda module, given, output: outputs.append(output))
    embedding = reward.net(pixels)
    assert len(hidden) == reward.depth - 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden, outputs[1:], strict=True))
    assert torch.equal(reward.exit(last).embedding, embedding)


def test_the_hidden_loss_is_the_error_relative_to_the_clean_tokens_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    clean = [torch.randn(2, 5, 4, generator=draw) * scale for scale in (1.0, 30.0)]
    hidden = [tokens + 0.5 * tokens.std() * torch.randn(tokens.shape, generator=draw) for tokens in clean]
    by_hand = 0.0
    for ours, theirs in zip(hidden, clean, strict=True):
        for row in range(2):
            error = sum(float((ours[row, n] - theirs[row, n]).square().sum()) for n in range(5)) / 20
            centred = theirs[row] - theirs[row].mean(0, keepdim=True)
            by_hand += error / (float(centred.square().sum()) / 4 / 4) / 4
    assert float(hidden_loss(hidden, clean)) == pytest.approx(by_hand, rel=1e-5)
    assert float(hidden_loss(clean, clean)) == 0


def test_the_states_come_closer_to_the_clean_ones(tmp_path: Path) -> None:
    value = pair()
    data = cache(tmp_path / "cache", value)
    only = attrs.evolve(RECIPE, steps=60, embedding_weight=0.0, token_weight=0.0, score_weight=0.0, learning_rate=3e-3)
    losses = finetune(value, data, only, progress=False)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_run_stopped_and_taken_up_again_ends_in_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    whole, halved = pair(), pair()
    data = cache(tmp_path / "cache", whole)
    finetune(whole, data, RECIPE, progress=False)
    read, calls = Examples.read, []

    def interrupted(self: Examples, rows):
        calls.append(rows)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return read(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Examples, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(halved, data, RECIPE, checkpoint=tmp_path / "run", progress=False)
    again = pair()
    finetune(again, data, RECIPE, checkpoint=tmp_path / "run", progress=False)
    expected, found = whole.branches.state_dict(), again.branches.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = pair().branches.state_dict()
    assert all(not torch.equal(start[name], found[name]) for name in found if name.endswith("c_fc.weight"))


def test_a_cache_without_images_is_an_error(tmp_path: Path) -> None:
    value = pair()
    data = cache(tmp_path / "cache", value, keep_images=False)
    with pytest.raises(core.ConfigError, match="hidden_weight"):
        finetune(value, data, RECIPE, progress=False)


def test_a_step_of_muon_is_the_published_one_to_float32() -> None:
    """Against the iteration by hand in float64; bfloat16, which torch's own takes on every device, would be off by some
    tenths of a percent."""
    value = pair()
    optimisers = Optimisers.of(value, RECIPE)
    (group,) = optimisers.named["muon"].param_groups
    draw, expected = torch.Generator().manual_seed(0), []
    for matrix in group["params"]:
        matrix.grad = torch.randn(matrix.shape, generator=draw)
        x = matrix.grad.double() / matrix.grad.double().norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        expected.append(matrix.detach().double() - 1e-3 * 0.2 * max(matrix.shape) ** 0.5 * x)
    optimisers.step(torch.amp.GradScaler("cpu", enabled=False))
    assert len(expected) >= 4
    for matrix, moved in zip(group["params"], expected, strict=True):
        torch.testing.assert_close(matrix.detach().double(), moved, rtol=0, atol=2e-7)


def test_a_torch_without_muon_is_an_error(tmp_path: Path, monkeypatch) -> None:
    value = pair()
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(core.ConfigError, match=r"2\.9"):
        finetune(value, cache(tmp_path / "cache", value), RECIPE, progress=False)


ADAM = attrs.evolve(RECIPE, optimiser="adamw")
GROUPED = attrs.evolve(ADAM, generated=0.75, seeds_per_prompt=3, rank_weight=0.1)


def shared(value: core.StitchedValue, folder: Path) -> None:
    """What two processes share: a finetune on pictures alone, or on pictures and the seeds of four prompts."""
    images, samples = (Examples(folder / which, len(IMAGES)) for which in ("images", "samples"))
    if samples.folder.exists():
        finetune(value, images, GROUPED, samples=samples, progress=False)
    else:
        finetune(value, images, ADAM, progress=False)


def share(folder: Path) -> None:
    value = pair()
    shared(value, folder)
    write_tensors(folder / f"{os.environ['RANK']}.safetensors", value.branches.state_dict())


@pytest.mark.parametrize("grouped", [False, True], ids=["images", "images and samples"])
def test_two_processes_give_what_one_gives(tmp_path: Path, grouped: bool) -> None:
    """Each takes half of every batch, and the levels' errors of both count; sums differ in their order alone."""
    begin = pair()
    cache(tmp_path / "images", begin)
    if grouped:
        latents = from_samples(mmdit(), list("abcd"), len(IMAGES), 32, 8, GenerationSettings(steps=2))
        cache(tmp_path / "samples", begin, latents=latents)
    start = {name: t.clone() for name, t in begin.branches.state_dict().items()}
    processes = start_two(share, tmp_path)
    shared(begin, tmp_path)
    assert processes.wait() == 0
    one, two = begin.branches.state_dict(), read_tensors(tmp_path / "1.safetensors")
    for tensors in (one, two):
        for name, tensor in tensors.items():
            if name.endswith("in_proj_bias"):
                # attention does not depend on the keys' bias, and Adam makes whole steps of its rounding errors
                tensor.chunk(3)[1].zero_()
    assert_close(two, one, start)
