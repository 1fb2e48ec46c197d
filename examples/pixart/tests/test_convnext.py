"""The ConvNeXt classifier as a reward: sliced bit for bit, its score, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import timm
import torch

from stitchvm import core
from stitchvm.core import Tail
from stitchvm_pixart.convnext import ConvNextReward

RECORD = core.registry().reward("convnext-golden-retriever")


@pytest.fixture(scope="module")
def reward() -> ConvNextReward:
    return core.build_twin(RECORD)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_every_cut_resumes_to_the_upstream_forward(reward, pixels):
    logits = reward.net(pixels)
    for cut in range(reward.depth + 1):
        output = reward.resume(reward.head(pixels, None, cut), cut)
        assert torch.equal(reward.net.head.fc(output.embedding), logits), cut
        assert torch.equal(output.score, logits.log_softmax(-1)[:, 3]), cut
    assert output.tokens.shape == (3, 1, 40)


def test_a_tail_from_any_block_is_the_rest_of_the_model(reward, pixels):
    whole = reward.resume(reward.head(pixels, None, 0), 0)
    for j in range(1, reward.depth + 2):
        state = reward.head(pixels, None, j - 1)
        tail = Tail(reward, j, reward.prefix(state)[0])
        assert torch.equal(tail(reward.grid(state)).score, whole.score), j
        owned = set(tail.part.net.state_dict())
        assert not any(name.startswith("stem") for name in owned)
        assert {name.split(".")[3] for name in owned if name.startswith("stages.0.")} == {
            str(k) for k in range(j - 1, 3)
        }
    with pytest.raises(core.SliceError, match="reads a 8x8 patch grid"):
        tail(torch.zeros(1, 16, 4, 4))


def test_every_cut_lies_in_the_first_stage(reward):
    assert [(at.num_chs, at.reduction) for at in reward.feature_info()] == [(16, 4)] * 4
    assert reward.grid_size == 8
    full = core.build_geometry(RECORD)
    assert [(at.num_chs, at.reduction) for at in full.feature_info()] == [(128, 4)] * 4
    assert sum(p.numel() for p in full.parameters()) == 88_591_464, "as timm counts convnext_base"


def test_preprocessing_is_timms(reward):
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    drawn = torch.rand(9, 12, 3, generator=torch.Generator().manual_seed(3))
    picture = Image.fromarray((drawn * 255).byte().numpy()).resize((80, 60), Image.Resampling.BICUBIC)
    transform = timm.data.create_transform(
        input_size=32, interpolation="bicubic", crop_pct=0.875, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    ours = reward.preprocess(to_tensor(picture)[None])[0]
    assert float((ours - transform(picture)).abs().max()) < 2.5 / 255 / 0.22, "timm rounds to 8 bits twice"


def test_the_score_is_differentiable_in_the_image(reward):
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(4)).requires_grad_()
    score = reward.rate(images, reward.condition(None))
    assert score.shape == (2,)
    assert bool((score < 0).all())
    score.sum().backward()
    assert float(images.grad.abs().sum()) > 0


def _saved(folder: Path) -> Any:
    settings = {name: value for name, value in RECORD.twin.items() if name not in ("image_size", "crop", "label")}
    torch.manual_seed(5)
    net = timm.create_model(settings.pop("model"), **settings).eval()
    timm.models.save_for_hf(net, str(folder), safe_serialization=True)
    return net


def test_loaded_from_timms_layout_it_is_timms_model(tmp_path, pixels):
    net = _saved(tmp_path)
    record = attrs.evolve(RECORD, repo=None, path=str(tmp_path), architecture=RECORD.twin)
    loaded = core.load_reward(record)
    assert torch.equal(loaded.resume(loaded.head(pixels, None, 0), 0).score, net(pixels).log_softmax(-1)[:, 3])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "convnext_tiny"}))
    with pytest.raises(core.WeightsError, match="architecture is convnext_tiny, expected convnext_base"):
        core.load_reward(record)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": 5}, "classes 0 to 4"),
        ({"model": "resnet18"}, "unexpected keyword|expected a ConvNeXt"),
        ({"model": "convnext_huge_typo"}, "timm cannot make"),
        ({"depth": 3}, "timm cannot make"),
    ],
)
def test_an_architecture_that_cannot_be_built(change, said):
    with pytest.raises(core.ConfigError, match=said):
        ConvNextReward.build({**RECORD.twin, **change})


def test_prompts_are_refused(reward):
    with pytest.raises(core.ConfigError, match="images alone"):
        reward.condition(["a dog"])
    with pytest.raises(core.SliceError, match="preprocess the images first"):
        reward.stem(torch.zeros(1, 3, 40, 40))
