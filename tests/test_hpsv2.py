"""HPSv2: its checkpoint, its letterbox and its score, against open_clip and torchvision."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import torchvision.transforms.functional as V
from PIL import Image
from torchvision.transforms import InterpolationMode

import families
import reward_families
from stitchvm import core
from stitchvm.core import ConfigError, WeightsError
from stitchvm.plugins.rewards.clip import ClipReward
from stitchvm.plugins.rewards.hpsv2 import Hpsv2Reward, Letterbox
from stitchvm.plugins.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD

FILE = "HPS_v2.1_compressed.pt"


def _record(folder: Path, file: str = FILE, **fields):
    architecture = families.clip_architecture(quick_gelu=False)
    return reward_families.record("hpsv2", folder, architecture, filename=file, **fields)


def _reference(image: Image.Image, size: int) -> torch.Tensor:
    """HPSv2's validation transform, step by step: to a tensor, longest side to size, black bars, normalise."""
    pixels = V.to_tensor(image)
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    new = [round(height * scale), round(width * scale)]
    if new != [height, width]:
        pixels = V.resize(pixels, new, InterpolationMode.BICUBIC, antialias=True)
    down, right = size - new[0], size - new[1]
    pixels = V.pad(pixels, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    return V.normalize(pixels, list(OPENAI_MEAN), list(OPENAI_STD))


def _picture(height: int, width: int) -> Image.Image:
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    noise[:, :, width // 2 :] = 1.0
    return V.to_pil_image(noise)


SIDES = [(28, 28), (64, 64), (20, 20), (96, 50), (37, 90), (28, 17), (200, 300), (301, 7)]


@pytest.mark.parametrize("sides", SIDES)
def test_the_letterbox_follows_hpsv2_transform(sides):
    """To float32 rounding: neither rounds to 8 bits. 28 x 17 gets bars here too, where HPSv2 leaves them out."""
    image = _picture(*sides)
    ours = Letterbox(size=28)(V.to_tensor(image)[None])[0]
    torch.testing.assert_close(ours, _reference(image, 28), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sides", SIDES[:5])
def test_the_letterbox_is_near_one_by_pil(sides):
    """To one level of 255 where PIL, which rounds to 8 bits after each direction, does the resizing; in a picture
    without extremes, since it clamps there too."""
    soft = V.to_tensor(_picture(*sides)) * 0.4 + 0.3
    image = V.to_pil_image(soft)
    scale = 28 / max(sides)
    small = image.resize((round(sides[1] * scale), round(sides[0] * scale)), Image.Resampling.BICUBIC)
    ours = Letterbox(size=28, mean=0.0, std=1.0)(V.to_tensor(image)[None])[0].clamp(0, 1)
    left, top = (28 - small.width) // 2, (28 - small.height) // 2
    inside = ours[:, top : top + small.height, left : left + small.width]
    assert (inside - V.to_tensor(small)).abs().max() <= 1.05 / 255
    bars = ours.clone()
    bars[:, top : top + small.height, left : left + small.width] = 0
    assert not bars.any()


def test_the_letterbox_is_not_clips_transform():
    tall = torch.rand(1, 3, 60, 30, generator=torch.Generator().manual_seed(0))
    clip, ours = families.clip(quick_gelu=False), reward_families.hpsv2()
    assert not torch.allclose(clip.preprocess(tall), ours.preprocess(tall), atol=0.1)
    torch.testing.assert_close(ours.preprocess(tall)[..., 0], ours.preprocess(tall * 0)[..., 0])


def test_gradient_reaches_every_pixel():
    images = torch.rand(1, 3, 40, 60).requires_grad_()
    Letterbox(size=28)(images).square().sum().backward()
    assert bool((images.grad[0].abs().sum(0) > 0).all())


@pytest.mark.parametrize(
    ("config", "said"),
    [({"size": 32}, "the tower reads 28"), ({"resize_mode": "shortest"}, "resize_mode.*always pads to a square")],
)
def test_preprocessing_with_a_mistake(config, said):
    with pytest.raises(ConfigError, match=said):
        reward_families.hpsv2(preprocess_cfg=config)


def test_images_of_the_wrong_shape():
    with pytest.raises(ConfigError, match="batch, 3, height, width"):
        Letterbox(size=28)(torch.rand(3, 28, 28))


# -- checkpoint and score ---------------------------------------------------------------------------------------------


def test_score_is_hpsv2s(tmp_path):
    """As ``hpsv2.score`` computes it: the published state dict in an open_clip ViT, the diagonal of the similarities,
    no temperature."""
    reward_families.write_hpsv2(tmp_path / FILE)
    reward = Hpsv2Reward.from_pretrained(_record(tmp_path))
    model = open_clip.CLIP(**families.clip_architecture(quick_gelu=False)).eval()
    checkpoint = torch.load(tmp_path / FILE, map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    prompts, images = ["a red ball", "a blue cube"], [_picture(60, 40), _picture(60, 40).transpose(1)]
    given = torch.stack([_reference(image, 28) for image in images])
    with torch.no_grad():
        picture, text = model.encode_image(given, normalize=True), model.encode_text(
            open_clip.SimpleTokenizer(context_length=16)(prompts), normalize=True
        )  # fmt: skip
        score = reward.score(
            reward.judge(torch.stack([V.to_tensor(image) for image in images])), reward.condition(prompts)
        )
    torch.testing.assert_close(score, torch.diagonal(picture @ text.T), rtol=1e-4, atol=1e-5)
    assert reward.score_scale == 1.0


def test_the_named_file_is_the_one_that_is_read(tmp_path):
    """Both versions lie in one repository."""
    old, new = reward_families.hpsv2(), reward_families.write_hpsv2(tmp_path / FILE)
    with torch.no_grad():
        old.net.proj.mul_(2)
    torch.save({"state_dict": reward_families._open_clip_tensors(old)}, tmp_path / "HPS_v2_compressed.pt")
    pixels = reward_families.pixels()
    for file, written in ((FILE, new), ("HPS_v2_compressed.pt", old)):
        assert torch.equal(Hpsv2Reward.from_pretrained(_record(tmp_path, file)).net(pixels), written.net(pixels))


def test_half_precision_checkpoints_are_used_in_float32(tmp_path):
    reward = reward_families.hpsv2()
    tensors = {name: tensor.half() for name, tensor in reward_families._open_clip_tensors(reward).items()}
    torch.save({"state_dict": tensors}, tmp_path / FILE)
    loaded = Hpsv2Reward.from_pretrained(_record(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(
        loaded.net(reward_families.pixels()), reward.net(reward_families.pixels()), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gone", "there is no file"),
        ("truncated", "damaged"),
        ("missing", "1 missing .visual.proj"),
        ("unexpected", "1 unexpected .visual.extra"),
        ("no tensors", "not a state dict"),
        ("code", "runs code"),
    ],
)
def test_damaged_checkpoints_give_one_clear_error(tmp_path, change, said):
    reward_families.write_hpsv2(tmp_path / FILE)
    file = tmp_path / FILE
    content = torch.load(file, weights_only=True)
    if change == "gone":
        file.unlink()
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-2000])
    elif change == "no tensors":
        torch.save({"state_dict": {"visual.proj": 3}}, file)
    elif change == "code":
        torch.save({"state_dict": content["state_dict"], "made": Path("x")}, file)
    elif change == "missing":
        del content["state_dict"]["visual.proj"]
        torch.save(content, file)
    elif change == "unexpected":
        content["state_dict"]["visual.extra"] = torch.ones(1)
        torch.save(content, file)
    with pytest.raises(WeightsError, match=said):
        Hpsv2Reward.from_pretrained(_record(tmp_path))


def test_the_slicing_is_clips_own():
    assert {Hpsv2Reward.stem, Hpsv2Reward.block, Hpsv2Reward.exit} == {
        ClipReward.stem, ClipReward.block, ClipReward.exit,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "file"), [("hpsv2", "HPS_v2_compressed.pt"), ("hpsv2.1", FILE)])
def test_the_records_are_open_clips_vit_h_14_with_gelu(name, file):
    record = core.registry().reward(name)
    assert record.architecture == open_clip.get_model_config("ViT-H-14")
    assert not record.architecture.get("quick_gelu", False)
    assert (record.repo, record.filename) == ("xswu/HPSv2", file)
