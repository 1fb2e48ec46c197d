"""DINOv2: timm's folder and transform, two conventions of positions, and likeness to reference images."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image, to_tensor

import reward_families
from reward_families import REGISTERS, dinov2_architecture, record
from stitchvm import core
from stitchvm.core import Condition, ConfigError, RewardOutput, SliceError, WeightsError, concatenate, load_reward
from stitchvm.plugins.rewards.dinov2 import Dinov2Reward

PLAIN = "vit_large_patch14_dinov2"


@pytest.fixture(scope="module")
def reward() -> Dinov2Reward:
    return reward_families.dinov2()


def _pictures(count: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(3, 30 + 5 * k, 40 - 3 * k, generator=draw) for k in range(count)]


# -- the tower --------------------------------------------------------------------------------------------------------


def test_two_conventions_of_prefix_and_positions():
    plain, registers = reward_families.dinov2(), reward_families.dinov2(REGISTERS)
    assert (plain.prefix_count, len(plain.positions)) == (1, 17)
    assert (registers.prefix_count, len(registers.positions)) == (5, 16)
    pixels = reward_families.pixels(1)
    cls = plain.net.cls_token + plain.net.pos_embed[:, :1]
    assert torch.equal(plain.prefix(plain.stem(pixels)), cls)
    bare = torch.cat([registers.net.cls_token, registers.net.reg_token], dim=1)
    assert torch.equal(registers.prefix(registers.stem(pixels)), bare)


def test_features_are_timms_intermediates():
    for tower in (reward_families.dinov2(), reward_families.dinov2(REGISTERS)):
        pixels = reward_families.pixels()
        theirs = tower.net.forward_intermediates(pixels, return_prefix_tokens=True, norm=False, intermediates_only=True)
        for k, (grid, prefix) in enumerate(theirs, start=1):
            state = tower.head(pixels, None, k)
            assert torch.equal(tower.grid(state), grid)
            assert torch.equal(tower.prefix(state), prefix)


def test_only_the_plain_square_transformer_is_cut():
    for made, said in (
        (timm.create_model("vit_base_patch16_224", img_size=(28, 14), patch_size=7, embed_dim=16, depth=1, num_heads=2),
         "square"),
        (timm.create_model("vit_base_patch16_224", pos_embed="none", img_size=28, patch_size=7, embed_dim=16, depth=1,
                           num_heads=2), "no table"),
        (timm.create_model("resnet10t"), "not ResNet"),
    ):  # fmt: skip
        with pytest.raises(SliceError, match=said):
            Dinov2Reward(made, lambda images: images)


def test_the_plain_embedding_is_timms(tmp_path):
    """Without references there is no score, but an embedding: what timm gives for its own transform of the picture."""
    net = reward_families.write_dinov2(tmp_path)
    loaded = Dinov2Reward.from_pretrained(record("dinov2", tmp_path, dinov2_architecture()))
    transform = timm.data.create_transform((3, 28, 28), interpolation="bicubic", crop_pct=1.0, crop_mode="center")
    for sides in ((28, 28), (60, 40)):
        image = _picture(*sides)
        with torch.no_grad():
            ours, theirs = loaded.judge(to_tensor(image)[None]), net(transform(image)[None])
        assert float(F.cosine_similarity(ours.embedding, theirs)) > 0.999
        with pytest.raises(ConfigError, match="needs a condition .images., none was given"):
            loaded.condition(None)


# -- references -------------------------------------------------------------------------------------------------------


def test_score_is_the_mean_cosine_with_the_references(reward):
    references, images = _pictures(), torch.rand(2, 3, 33, 28)
    single = [reward.judge(picture[None]).embedding[0] for picture in references]
    embedding = reward.judge(images).embedding
    expected = torch.stack([F.cosine_similarity(embedding, one[None]) for one in single]).mean(0)
    for condition in (reward.encode_references(references), reward.condition(references)):
        assert condition["references"].shape == (1, 3, 16)
        torch.testing.assert_close(reward.score(reward.judge(images), condition.expand(2)), expected)
    one = reward.encode_references(references[:1])
    torch.testing.assert_close(
        reward.score(reward.judge(images), one.expand(2)), F.cosine_similarity(embedding, single[0][None])
    )


def test_several_references_count_alike():
    embedding = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    references = Condition({"references": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]])})
    score = reward_families.dinov2().score(RewardOutput(embedding[:, None], embedding), references.expand(2))
    torch.testing.assert_close(score, torch.tensor([0.25, 0.25]))


def test_an_image_is_most_like_itself(reward):
    picture = _pictures()[1]
    score = reward.score(reward.judge(picture[None]), reward.encode_references([picture]))
    torch.testing.assert_close(score, torch.ones(1))


def test_every_sample_may_have_references_of_its_own(reward):
    pictures = _pictures(4)
    joined = concatenate([reward.encode_references(pictures[:2]), reward.encode_references(pictures[2:])])
    images = torch.rand(2, 3, 28, 28)
    score = reward.score(reward.judge(images), joined)
    alone = reward.score(reward.judge(images[1:]), reward.encode_references(pictures[2:]))
    torch.testing.assert_close(score[1:], alone)


def test_a_stack_of_images_is_references_too(reward):
    stack = torch.rand(3, 3, 28, 28)
    assert torch.equal(
        reward.encode_references(stack)["references"], reward.encode_references(list(stack))["references"]
    )


@pytest.mark.parametrize("given", [[], [torch.rand(1, 3, 8, 8)], ["a cat"], "a cat", [torch.rand(3, 8, 8), "a cat"]])
def test_what_is_no_reference(reward, given):
    with pytest.raises(ConfigError, match="reference"):
        reward.condition(given)
    with pytest.raises(ConfigError, match="reference"):
        reward.encode_references(given)


def test_references_of_the_wrong_shape(reward):
    with pytest.raises(ConfigError, match="batch, 3, height, width"):
        reward.encode_references([torch.rand(1, 8, 8)])


def test_prompts_are_refused(reward):
    with pytest.raises(ConfigError, match="reference images, not with prompts"):
        reward.encode_prompts(["a cat"])
    with pytest.raises(ConfigError, match="reference images, not with prompts"):
        reward.condition(["a cat"])


def test_a_part_scores_but_cannot_read_references(reward):
    part = reward.prune(1, reward.depth, enter=True)
    with pytest.raises(ConfigError, match="with the whole reward"):
        part.encode_references(_pictures())


def test_the_condition_names_what_it_holds(reward):
    with pytest.raises(ConfigError, match="compares with 'references' .from images., but the condition holds text"):
        reward.score(reward.judge(torch.rand(1, 3, 28, 28)), Condition({"text": torch.ones(1, 16)}))


# -- preprocessing ----------------------------------------------------------------------------------------------------


def _picture(height: int, width: int) -> Image.Image:
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    noise[:, : height // 2] *= 0.2
    return to_pil_image(noise)


@pytest.mark.parametrize("sides", [(28, 28), (64, 64), (20, 20), (96, 50), (37, 91), (200, 300)])
def test_preprocessing_follows_timms_transform(sides, reward):
    """To one level of 255: PIL rounds to 8 bits after each direction."""
    transform = timm.data.create_transform(
        (3, 28, 28), interpolation="bicubic", crop_pct=1.0, crop_mode="center",
        mean=timm.data.IMAGENET_DEFAULT_MEAN, std=timm.data.IMAGENET_DEFAULT_STD,
    )  # fmt: skip
    image = _picture(*sides)
    theirs, ours = transform(image), reward.preprocess(to_tensor(image)[None])[0]
    std = torch.tensor(timm.data.IMAGENET_DEFAULT_STD)[:, None, None]
    assert ours.shape == theirs.shape == (3, 28, 28)
    assert ((ours - theirs) * std).abs().max() <= 1.05 / 255


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [PLAIN, REGISTERS])
def test_a_folder_of_timms_is_read_with_and_without_a_record(tmp_path, model):
    net = reward_families.write_dinov2(tmp_path, model)
    pixels = reward_families.pixels()
    by_record = Dinov2Reward.from_pretrained(record("dinov2", tmp_path, dinov2_architecture(model)))
    for loaded in (by_record, load_reward(str(tmp_path), family="dinov2")):
        assert torch.equal(loaded.net(pixels), net(pixels))
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())


def test_timm_itself_reads_the_same_folder(tmp_path):
    """The folder the tests write is one that timm takes for its own."""
    net = reward_families.write_dinov2(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(reward_families.pixels()), net(reward_families.pixels()))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_bare_checkpoint_takes_the_records_architecture(tmp_path, name):
    net = reward_families.write_dinov2(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/model.safetensors")
    torch.save(tensors, tmp_path / name) if name.endswith("pt") else save_file(tensors, tmp_path / name)
    loaded = Dinov2Reward.from_pretrained(record("dinov2", tmp_path / name, dinov2_architecture()))
    assert torch.equal(loaded.net(reward_families.pixels()), net(reward_families.pixels()))


def _changed(folder, **pretrained) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= pretrained
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("truncated", "truncated or damaged"),
        ("gone", "holds none of model.safetensors, pytorch_model.bin"),
        ("missing", "1 missing .norm.weight"),
        ("unexpected", "1 unexpected .mask_token"),
        ("no timm", "names no timm model"),
        ("size", "img_size is 518, expected 28"),
        ("mean", "mean is .0.5, 0.5, 0.5., expected .0.485"),
        ("margin", "crop_pct is 0.875, expected 1.0"),
        ("model", "model is 'vit_large_patch14_dinov2', expected 'vit_large_patch14_reg4_dinov2'"),
        ("classes", "num_classes is 1000, expected 0"),
    ],
)
def test_damaged_or_other_checkpoints_give_one_clear_error(tmp_path, change, said):
    reward_families.write_dinov2(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif change == "gone":
        file.unlink()
    elif change == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != "norm.weight"}, file)
    elif change == "unexpected":
        save_file(tensors | {"mask_token": torch.ones(1, 16)}, file)
    elif change == "no timm":
        config.write_text(json.dumps({"model_type": "dinov2"}))
    elif change == "size":
        _changed(tmp_path, input_size=[3, 518, 518])
    elif change == "mean":
        _changed(tmp_path, mean=[0.5, 0.5, 0.5])
    elif change == "margin":
        _changed(tmp_path, crop_pct=0.875)
    elif change == "classes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_classes": 1000}))
    architecture = dinov2_architecture(REGISTERS if change == "model" else PLAIN)
    with pytest.raises(WeightsError, match=said):
        Dinov2Reward.from_pretrained(record("dinov2", tmp_path, architecture))


def test_positions_of_another_size_are_not_resampled(tmp_path):
    """timm would do it without a word."""
    reward_families.write_dinov2(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"pos_embed: \[1, 17, 16\], expected \[1, 65, 16\]"):
        Dinov2Reward.from_pretrained(record("dinov2", tmp_path, dinov2_architecture(img_size=56)))


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"img_size": 28}, "names timm's 'model'"),
        ({"model": "vit_enormous"}, "cannot make 'vit_enormous'"),
        (dinov2_architecture(wings=2), "wings"),
        (dinov2_architecture(preprocess_cfg={"size": 32}), "the tower reads 28"),
    ],
)
def test_an_architecture_with_a_mistake(architecture, said):
    with pytest.raises(ConfigError, match=said):
        Dinov2Reward.build(architecture)


@pytest.mark.parametrize("name", ["dinov2-vit-l-14", "dinov2-vit-l-14-reg4"])
def test_the_records_are_timms_published_models(name):
    """What the record spells out is what timm means by the name: same tensors, size and transform."""
    entry = core.registry().reward(name)
    with torch.device("meta"):
        net = timm.create_model(entry.architecture["model"], num_classes=0)
    ours = core.build_geometry(entry)
    shapes = [{n: tuple(t.shape) for n, t in tower.state_dict().items()} for tower in (net, ours.net)]
    assert shapes[0] == shapes[1]
    assert type(net.norm) is type(ours.net.norm)
    published = timm.models.get_pretrained_cfg(entry.repo.removeprefix("timm/"))
    assert published.input_size[-1] == ours.image_size == 518
    preprocess = entry.architecture["preprocess_cfg"]
    assert (tuple(preprocess["mean"]), tuple(preprocess["std"])) == (published.mean, published.std)
    assert (published.interpolation, published.crop_pct, published.crop_mode) == ("bicubic", 1.0, "center")
    assert published.license == entry.licence == "apache-2.0"
