"""The CLIP family: its folder, its transform, its tail and its score, against open_clip itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import Transformer
from PIL import Image
from safetensors.torch import load_file, save_file

import families
from stitchvm.core import (
    ConfigError,
    CostMeter,
    RewardRecord,
    SliceError,
    Tail,
    WeightsError,
    build_twin,
    load_reward,
    registry,
)
from stitchvm.plugins.rewards.clip import ClipReward
from stitchvm.plugins.rewards.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def reward() -> ClipReward:
    return families.clip()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def _mean_prefix(reward: ClipReward, pixels: torch.Tensor, j: int) -> torch.Tensor:
    return reward.prefix(reward.head(pixels, None, j - 1)).mean(0)


# -- entering ---------------------------------------------------------------------------------------------------------


def test_entering_with_a_states_own_parts_gives_the_state_back(reward, pixels):
    for cut in range(reward.depth + 1):
        state = reward.head(pixels, None, cut)
        entered = reward.enter(reward.grid(state), reward.prefix(state))
        assert torch.equal(entered, state), cut
        assert torch.equal(reward.resume(entered, cut).embedding, reward.net(pixels))


def test_one_prefix_serves_the_batch(reward, pixels):
    state = reward.head(pixels, None, 1)
    prefix = reward.prefix(state)[0]
    assert prefix.shape == (1, 16)
    entered = reward.enter(reward.grid(state), prefix)
    assert torch.equal(entered[:, 1:], state[:, 1:])
    assert torch.equal(entered[:, :1], prefix.expand(3, 1, 16))


def test_positions_are_added_only_when_asked(reward, pixels):
    state = reward.head(pixels, None, 1)
    again = reward.enter(reward.grid(state), reward.prefix(state), positions=True)
    assert torch.equal(again, state + reward.net.positional_embedding)


@torch.no_grad()  # torch's attention has a path of its own, rounding differently, where no gradient is needed
@pytest.mark.parametrize("positions", [False, True])
def test_a_tail_from_any_block_equals_the_rest_of_the_tower(reward, pixels, positions):
    """With one image the mean prefix is that image's own, so the tail must give the tower's embedding, bit for bit."""
    one = pixels[:1]
    for j in range(1, reward.depth + 2):
        tail = Tail(reward, j, _mean_prefix(reward, one, j), positions=positions)
        state = reward.head(one, None, j - 1)
        if positions:
            tail.part.net.positional_embedding.zero_()
        assert torch.equal(tail(reward.grid(state)).embedding, reward.net(one)), j
        names = set(tail.part.net.state_dict())
        assert not [n for n in names if n.startswith(("conv1", "class_embedding", "ln_pre"))]
        earlier = [path for path in reward.block_modules[: j - 1] if any(n.startswith(path + ".") for n in names)]
        assert not earlier


def test_a_tail_is_a_copy(reward, pixels):
    tail = Tail(reward, 2, _mean_prefix(reward, pixels, 2))
    before = reward.net(pixels)
    for parameter in tail.parameters():
        parameter.data += 1
    assert torch.equal(reward.net(pixels), before)


def test_a_grid_of_another_size_is_refused(reward):
    with pytest.raises(SliceError, match="4x4 patch grid"):
        reward.enter(torch.zeros(1, 16, 5, 5), torch.zeros(1, 16))


def test_pixels_of_another_size_are_refused(reward):
    with pytest.raises(SliceError, match="preprocess the images first"):
        reward.stem(torch.zeros(1, 3, 32, 32))


def test_grid_keeps_rows_and_columns(reward, pixels):
    moved = pixels.clone()
    moved[:, :, :7, -7:] += 1
    change = (reward.grid(reward.stem(moved)) - reward.grid(reward.stem(pixels))).abs().amax(dim=(0, 1))
    assert (change > 0).nonzero().tolist() == [[0, 3]]


# -- towers -----------------------------------------------------------------------------------------------------------


def test_a_tower_whose_blocks_want_the_sequence_first(pixels):
    model = open_clip.CLIP(**families.clip_architecture())
    torch.manual_seed(0)
    model.visual.transformer = Transformer(16, 3, 2, batch_first=False)
    reward = ClipReward(model.visual.eval(), Preprocessing(size=28))
    upstream = reward.net(pixels)
    for cut in range(reward.depth + 1):
        assert torch.equal(reward.resume(reward.head(pixels, None, cut), cut).embedding, upstream), cut


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "not by attention"),
        ({"pool_type": "none"}, "not by attention or not at all"),
        ({"layers": [1, 1, 1, 1], "image_size": 32, "width": 8}, "not ModifiedResNet"),
        ({"image_size": [28, 14]}, "square images"),
    ],
)
def test_towers_of_another_kind_are_refused(vision, said):
    with pytest.raises(SliceError, match=said):
        families.clip(vision=vision)


def test_tokens_are_those_after_the_last_norm(reward, pixels):
    output = reward.resume(reward.head(pixels, None, 0), 0)
    pooled, tokens = reward.net._pool(reward.head(pixels, None, reward.depth))
    assert torch.equal(output.tokens[:, 1:], tokens)
    assert torch.equal(output.tokens[:, 0], pooled)
    assert output.score is None


def test_bfloat16_is_close_to_float32(tmp_path, pixels):
    families.write_clip(tmp_path)
    record = families.clip_record(tmp_path)
    full, half = (ClipReward.from_pretrained(record, dtype=dtype) for dtype in (None, torch.bfloat16))
    ours, exact = half.judge(pixels.sigmoid()).embedding, full.judge(pixels.sigmoid()).embedding
    assert ours.dtype == torch.bfloat16
    assert bool((F.cosine_similarity(ours.float(), exact) > 0.995).all())
    condition = half.encode_prompts(["a cat"])
    assert half.score(half.judge(pixels.sigmoid()), condition).shape == (3,)


# -- text and score ---------------------------------------------------------------------------------------------------


def test_score_is_open_clips_cosine_similarity(tmp_path):
    families.write_clip(tmp_path)
    reward = ClipReward.from_pretrained(families.clip_record(tmp_path))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    images = torch.rand(2, 3, 28, 28).mul(255).round().div(255)
    prompts = ["a red ball", "a blue cube"]
    given = torch.stack([preprocess(_pil(image)) for image in images])
    with torch.no_grad():
        features = model.encode_image(given, normalize=True), model.encode_text(tokenizer(prompts), normalize=True)
    with CostMeter() as cost:
        score = reward.score(reward.judge(images), reward.encode_prompts(prompts))
    torch.testing.assert_close(score, (features[0] * features[1]).sum(-1), rtol=1e-4, atol=1e-5)
    assert cost.passes["reward"] == 2
    assert reward.condition_kind == "prompts"


def test_text_is_normalised_and_without_gradient(reward):
    text = reward.encode_prompts(["a cat", "a dog", ""])["text"]
    assert text.shape == (3, 12)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    assert not text.requires_grad
    torch.testing.assert_close(reward.encode_prompts(["a dog"])["text"], text[1:2])


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_prompts_must_be_a_list(reward, prompts):
    with pytest.raises(ConfigError, match="list of at least one prompt"):
        reward.encode_prompts(prompts)


def test_a_part_scores_but_does_not_encode_text(reward, pixels):
    part = reward.prune(1, reward.depth, enter=True)
    condition = reward.encode_prompts(["a cat"])
    output = reward.judge(pixels)
    assert torch.equal(part.score(output, condition), reward.score(output, condition))
    with pytest.raises(ConfigError, match="whole reward"):
        part.encode_prompts(["a cat"])


# -- preprocessing ----------------------------------------------------------------------------------------------------


def _pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())


def _picture(height: int, width: int) -> torch.Tensor:
    """Smooth colours, a hard edge and noise, in 8-bit steps."""
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 1, width)[None].expand(height, width)
    noise = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    picture = torch.stack([rows, (columns > 0.4).float(), 0.5 * columns + 0.5 * noise])
    return picture.mul(255).round().div(255)


@pytest.mark.parametrize("sides", [(64, 64), (28, 28), (20, 20), (96, 50), (37, 90), (28, 41), (200, 300)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_follows_open_clips_transform(sides, mode, interpolation):
    """To one level of 255: PIL rounds to 8 bits after each direction."""
    config = {"resize_mode": mode, "interpolation": interpolation, "fill_color": 40, "mean": (0.5, 0.4, 0.3)}
    picture = _picture(*sides)
    theirs = image_transform_v2(PreprocessCfg(size=28, **config), is_train=False)(_pil(picture))
    ours = Preprocessing.from_config(28, config)(picture[None])[0]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    assert ours.shape == theirs.shape == (3, 28, 28)
    assert ((ours - theirs) * std).abs().max() <= 1.05 / 255


def test_preprocessing_is_differentiable():
    images = torch.rand(1, 3, 40, 60).requires_grad_()
    Preprocessing(size=28)(images).square().sum().backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert bool(seen[:, 12:48].all())
    assert not bool(seen[:, :5].any())  # the centre crop drops the sides


def test_the_folders_preprocessing_is_used(tmp_path):
    config = {"size": 28, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    families.write_clip(tmp_path, families.clip_architecture(preprocess_cfg=config))
    reward = ClipReward.from_pretrained(families.clip_record(tmp_path))
    images = torch.rand(1, 3, 28, 28)
    torch.testing.assert_close(reward.preprocess(images), images * 2 - 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"size": 32}, "the tower reads 28"),
        ({"resize_mode": "stretch"}, "resize_mode"),
        ({"interpolation": "random"}, "interpolation"),
        ({"meen": [0.5] * 3}, "meen"),
    ],
)
def test_preprocessing_with_a_mistake(config, said):
    with pytest.raises(ConfigError, match=said):
        families.clip(preprocess_cfg=config)


def test_images_of_the_wrong_shape(reward):
    with pytest.raises(ConfigError, match="batch, 3, height, width"):
        reward.preprocess(torch.rand(3, 28, 28))


# -- loading ----------------------------------------------------------------------------------------------------------


def test_folder_round_trip(tmp_path, pixels):
    written = families.write_clip(tmp_path)
    loaded = load_reward(str(tmp_path), family="clip")
    assert torch.equal(loaded.net(pixels), written.net(pixels))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    prompts = ["a cat", "two dogs"]
    assert torch.equal(loaded.encode_prompts(prompts)["text"], written.encode_prompts(prompts)["text"])


def test_half_precision_weights_are_used_in_float32(tmp_path, pixels):
    families.write_clip(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    reward = ClipReward.from_pretrained(families.clip_record(tmp_path))
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    assert reward.net(pixels).dtype == torch.float32


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_bare_checkpoint_takes_the_records_architecture(tmp_path, pixels, name):
    written = families.write_clip(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/open_clip_model.safetensors")
    if name.endswith("pt"):
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in tensors.items()}}, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    architecture = families.clip_architecture()
    by_name = RewardRecord(name="x", family="clip", path=str(tmp_path), filename=name, architecture=architecture)
    by_path = RewardRecord(name="x", family="clip", path=str(tmp_path / name), architecture=architecture)
    for record in (by_name, by_path):
        reward = ClipReward.from_pretrained(record)
        assert torch.equal(reward.net(pixels), written.net(pixels))
        assert reward.encode_prompts(["a cat"])["text"].shape == (1, 12)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    families.write_clip(tmp_path)
    torch.save({"state_dict": {"x": Trap()}}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="runs code when read"):
        ClipReward.from_pretrained(families.clip_record(tmp_path, filename="weights.pt"))
    assert not (tmp_path / "sprung").exists()


def _damage(folder: Path, change: str) -> None:
    file, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    tensors, content = load_file(file), json.loads(config.read_text())
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif change == "gone":
        file.unlink()
    elif change == "missing":
        save_file({n: t for n, t in tensors.items() if n != "visual.ln_post.bias"}, file)
    elif change == "unexpected":
        save_file(tensors | {"visual.extra": torch.ones(1)}, file)
    elif change == "other size":  # open_clip itself would resample the positions without a word
        positions = tensors["visual.positional_embedding"]
        save_file(tensors | {"visual.positional_embedding": torch.cat([positions, positions[1:]])}, file)
    elif change == "no model_cfg":
        config.write_text(json.dumps(content["model_cfg"]))
    elif change == "gelu":
        content["model_cfg"]["quick_gelu"] = False
        config.write_text(json.dumps(content))
    elif change == "resolution":
        content["model_cfg"]["vision_cfg"]["image_size"] = 56
        config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("truncated", "truncated or damaged"),
        ("gone", "holds none of open_clip_model.safetensors"),
        ("missing", "1 missing .visual.ln_post.bias"),
        ("unexpected", "1 unexpected .visual.extra"),
        ("other size", r"visual.positional_embedding: \[33, 16\], expected \[17, 16\]"),
        ("no model_cfg", "no model_cfg"),
        ("gelu", "quick_gelu is False, expected True"),
        ("resolution", "vision_cfg.image_size is 56, expected 28"),
    ],
)
def test_damaged_checkpoints_give_one_clear_error(tmp_path, change, said):
    families.write_clip(tmp_path)
    _damage(tmp_path, change)
    record = families.clip_record(tmp_path, architecture=families.clip_architecture())
    with pytest.raises(WeightsError, match=said):
        ClipReward.from_pretrained(record)


def test_weights_for_gelu_under_a_quickgelu_name(tmp_path):
    """A record that leaves quick_gelu out means gelu, as open_clip's configurations do."""
    families.write_clip(tmp_path)
    architecture = families.clip_architecture()
    del architecture["quick_gelu"]
    with pytest.raises(WeightsError, match="quick_gelu is True, expected False"):
        ClipReward.from_pretrained(families.clip_record(tmp_path, architecture=architecture))


def test_a_configuration_with_an_unknown_setting():
    for change in ({"embd_dim": 3}, {"vision_cfg": {"layer": 3}}, {"text_cfg": {"widht": 3}}):
        with pytest.raises(ConfigError, match=r"embd_dim|layer|widht"):
            ClipReward.build(families.clip_architecture() | change)
    with pytest.raises(ConfigError, match="text_cfg"):
        ClipReward.build({"embed_dim": 3, "vision_cfg": {}})


def test_gradient_goes_from_score_to_image(reward):
    images = torch.rand(2, 3, 32, 28).requires_grad_()
    score = reward.score(reward.judge(images), reward.encode_prompts(["a cat", "a dog"]))
    score.sum().backward()
    assert bool((images.grad.flatten(1).abs().sum(1) > 0).all())
    assert bool(np.isfinite(images.grad.numpy()).all())


def test_the_twin_runs_from_picture_to_score():
    twin = build_twin(registry().reward("clip-vit-l-14-336"))
    score = twin.score(twin.judge(torch.rand(2, 3, 40, 30)), twin.encode_prompts(["a cat", "a dog"]))
    assert score.shape == (2,)
    assert bool((score.abs() <= 1 + 1e-6).all())
