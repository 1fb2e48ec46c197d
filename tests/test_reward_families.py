"""What every reward family must hold: entering, tails, conditions, gradients, and a stitch from end to end."""

from __future__ import annotations

import copy

import pytest
import torch

import families
import reward_families
from stitchvm import core
from stitchvm.core import Condition, ConfigError, Reward, RewardOutput, SliceError, Tail, artefact
from stitchvm.core.stitching.finetune_settings import FinetuneSettings


@pytest.fixture(params=reward_families.REWARDS, ids=lambda name: f"reward-{name}", scope="module")
def reward(request: pytest.FixtureRequest) -> Reward:
    return reward_families.REWARDS[request.param]()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return reward_families.pixels()


def _same(ours: RewardOutput, theirs: RewardOutput) -> bool:
    pairs = [(ours.embedding, theirs.embedding), (ours.tokens, theirs.tokens)]
    if theirs.score is not None:
        assert ours.score is not None
        pairs.append((ours.score, theirs.score))
    return all(torch.equal(mine, other) for mine, other in pairs)


def test_entering_with_a_states_own_parts_gives_the_state_back(reward, pixels, parity):
    for cut in range(reward.depth + 1):
        state = reward.head(pixels, None, cut)
        grid, prefix = reward.grid(state), reward.prefix(state)
        assert (prefix.shape[1], *grid.shape[-2:]) == (reward.prefix_count, reward.grid_size, reward.grid_size)
        assert torch.equal(reward.enter(grid, prefix), state), cut
    parity("enter", f"cuts 0-{reward.depth}")


@torch.no_grad()  # torch's attention has a path of its own, rounding differently, where no gradient is needed
def test_a_tail_from_any_block_is_the_rest_of_the_model(reward, pixels, parity):
    """With one image the mean prefix is that image's own: tokens, embedding and score must agree bit for bit."""
    one = pixels[:1]
    whole = reward.resume(reward.head(one, None, 0), 0)
    assert torch.equal(whole.embedding, reward.net(one))
    for j in range(1, reward.depth + 2):
        state = reward.head(one, None, j - 1)
        tail = Tail(reward, j, reward.prefix(state)[0])
        assert _same(tail(reward.grid(state)), whole), j
        names = set(tail.part.net.state_dict())
        gone = (*reward.block_modules[: j - 1], *(set(reward.stem_modules) - set(reward.enter_modules)))
        assert not [n for n in names if any(n == path or n.startswith(path + ".") for path in gone)], j
    parity("tail(prefix)", f"j 1-{reward.depth + 1}")


def test_positions_are_added_only_when_asked_and_only_where_the_model_has_them(reward, pixels):
    state = reward.head(pixels, None, 1)
    again = reward.enter(reward.grid(state), reward.prefix(state), positions=True)
    table = reward.positions
    patches = reward.grid_size**2
    assert len(table) in (patches, patches + reward.prefix_count)
    assert torch.equal(again[:, -len(table) :], state[:, -len(table) :] + table)
    assert torch.equal(again[:, : -len(table)], state[:, : -len(table)])


def test_grid_keeps_rows_and_columns(reward, pixels):
    moved = pixels.clone()
    moved[:, :, :7, -7:] += 1
    change = (reward.grid(reward.stem(moved)) - reward.grid(reward.stem(pixels))).abs().amax(dim=(0, 1))
    assert (change > 1e-6).nonzero().tolist() == [[0, 3]]


def test_pixels_and_grids_of_another_size_are_refused(reward):
    with pytest.raises(SliceError, match="preprocess the images first"):
        reward.stem(torch.zeros(1, 3, 35, 35))
    with pytest.raises(SliceError, match="4x4 patch grid"):
        reward.enter(torch.zeros(1, 16, 5, 5), torch.zeros(reward.prefix_count, 16))


def test_gradient_goes_from_score_to_image(reward):
    images = torch.rand(2, 3, 32, 28, generator=torch.Generator().manual_seed(4)).requires_grad_()
    condition = reward.condition(reward_families.compared(reward)).expand(2)
    score = reward.score(reward.judge(images), condition)
    assert score.shape == (2,)
    score.sum().backward()
    assert images.grad is not None
    assert bool((images.grad.flatten(1).abs().sum(1) > 0).all())
    assert bool(images.grad.isfinite().all())


def test_the_condition_is_without_gradient_and_serves_a_part(reward, pixels):
    condition = reward.condition(reward_families.compared(reward))
    assert not any(tensor.requires_grad for tensor in condition.tensors.values())
    for tensor in condition.tensors.values():
        torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(tensor.shape[:-1]))
    output = reward.judge(pixels.sigmoid())
    part = reward.prune(1, reward.depth, enter=True)
    assert torch.equal(part.score(output, condition.expand(3)), reward.score(output, condition.expand(3)))
    if reward.condition_kind != "nothing":
        with pytest.raises(ConfigError, match="whole reward"):
            part.condition(reward_families.compared(reward))


def test_a_missing_or_surplus_condition_is_an_error(reward, pixels):
    output = reward.judge(pixels.sigmoid())
    wrong = [Condition({"sound": torch.ones(3, 4)})]
    if reward.condition_kind == "nothing":
        assert not reward.condition(None).tensors
        with pytest.raises(ConfigError, match="leave the condition"):
            reward.condition(["a red ball"])
        said = "leave the condition (sound) out"
    else:
        with pytest.raises(ConfigError, match="needs a condition"):
            reward.condition(None)
        own = reward.condition(reward_families.compared(reward)).expand(3)
        wrong += [Condition(), Condition({**own.tensors, "sound": torch.ones(3, 4)})]
        said = "compares with '"
    for condition in wrong:
        with pytest.raises(ConfigError) as caught:
            reward.score(output, condition)
        assert said in str(caught.value)


def test_bfloat16_keeps_to_its_precision(reward):
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    condition = reward.condition(reward_families.compared(reward)).expand(2)
    exact = reward.score(reward.judge(images), condition)
    half = copy.copy(reward)
    half._modules = {"net": copy.deepcopy(reward.net).bfloat16()}
    output = half.judge(images)
    assert output.embedding.dtype == torch.bfloat16
    torch.testing.assert_close(half.score(output, condition).float(), exact, rtol=0.05, atol=0.05)


def test_a_stitch_from_end_to_end(reward, tmp_path, monkeypatch):
    """Search, finetune, value with a gradient, and an artefact that gives the same value again."""
    backbone = families.mmdit()
    monkeypatch.setattr(artefact, "load_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr(artefact, "load_reward", lambda *_, **__: reward)
    pictures = list(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    recipe = FinetuneSettings(steps=2, batch_size=4, warmup_steps=0, learning_rate=1e-3)
    value = core.stitch(
        backbone, reward, images=pictures, work=tmp_path / "work", recipe=recipe, cuts=(2,), blocks=(1, 2), probes=6,
        batch=3, count=6, resolution=16, progress=False,
    )  # fmt: skip
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scored = value(latents, 0.5, reward_families.compared(reward))
    assert scored.shape == (2,)
    scored.sum().backward()
    assert latents.grad is not None
    assert bool(latents.grad.isfinite().all())
    assert float(latents.grad.abs().sum()) > 0
    value.save_pretrained(tmp_path / "value")
    again = core.StitchedValue.from_pretrained(tmp_path / "value")
    torch.testing.assert_close(again(latents, 0.5, reward_families.compared(reward)), scored)


BUILT_IN = [
    entry.name
    for entry in core.registry().rewards.values()
    if entry.source is not None and entry.source.level == "built-in"
]


@pytest.mark.parametrize("sides", [(28, 28), (64, 64), (40, 30), (24, 70)])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_gradient_through_preprocessing_is_its_derivative(name, sides):
    """Resizing, cropping and padding are linear where nothing is clamped, so differences are exact up to rounding."""
    twin = core.build_twin(core.registry().reward(name))
    draw = torch.Generator().manual_seed(0)
    images = (0.45 + 0.1 * torch.rand(2, 3, *sides, generator=draw)).requires_grad_()
    step = 0.05 * torch.randn(images.shape, generator=draw).clamp(-1, 1)
    weights = torch.randn(2, 3, twin.image_size, twin.image_size, generator=draw)
    (gradient,) = torch.autograd.grad((weights * twin.preprocess(images)).sum(), images)
    with torch.no_grad():
        change = (weights * (twin.preprocess(images + step) - twin.preprocess(images))).sum()
    torch.testing.assert_close((gradient * step).sum(), change, rtol=1e-3, atol=1e-3)
    assert float(change.abs()) > 0.05


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_twin_runs_from_picture_to_score(name):
    twin = core.build_twin(core.registry().reward(name))
    condition = twin.condition(reward_families.compared(twin)).expand(2)
    score = twin.score(twin.judge(torch.rand(2, 3, 40, 30)), condition)
    assert score.shape == (2,)
    assert bool(score.isfinite().all())
