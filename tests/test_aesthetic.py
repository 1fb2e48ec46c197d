"""LAION's aesthetic predictor: the authors' file, their arithmetic, and a predictor that training leaves alone."""

from __future__ import annotations

import hashlib

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image, to_tensor

import families
import reward_families
from reward_families import PREDICTOR, WIDTHS, aesthetic_architecture, record
from stitchvm import core
from stitchvm.core import ConfigError, Tail, WeightsError
from stitchvm.plugins.rewards.aesthetic import AestheticReward, Predictor
from stitchvm.plugins.rewards.clip import ClipReward


@pytest.fixture
def folder(tmp_path):
    reward_families.write_aesthetic(tmp_path)
    return tmp_path


def _picture(height: int, width: int) -> Image.Image:
    return to_pil_image(torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)))


def test_score_is_the_authors(tmp_path):
    """open_clip's embedding, its direction, and the authors' own module with dropout, in eval mode."""
    authors = reward_families.write_aesthetic(tmp_path)
    reward = AestheticReward.from_pretrained(record("aesthetic", tmp_path, aesthetic_architecture()))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    images = [_picture(28, 28), _picture(60, 40)]
    with torch.no_grad():
        for image in images:
            embedding = model.encode_image(preprocess(image)[None])
            expected = authors(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
            output = reward.judge(to_tensor(image)[None])
            torch.testing.assert_close(output.score, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(reward.score(output, reward.condition(None)), expected, rtol=1e-3, atol=1e-3)
            assert abs(float(authors(embedding)[0, 0] - expected)) > 1e-2, "the norm matters"


def test_the_predictor_alone_is_the_authors_bit_for_bit(tmp_path):
    authors = reward_families.write_aesthetic(tmp_path)
    ours = Predictor(WIDTHS)
    ours.load_state_dict(torch.load(tmp_path / PREDICTOR, weights_only=True))
    embedding = torch.randn(5, 12)
    assert torch.equal(ours(embedding), authors(F.normalize(embedding, dim=-1))[:, 0].detach())


def test_the_published_layers_have_the_published_names():
    names = {f"layers.{number}.{kind}" for number in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    predictor = Predictor([768, 1024, 128, 64, 16, 1])
    assert set(predictor.state_dict()) == names
    assert sum(tensor.numel() for tensor in predictor.state_dict().values()) == 927_969


def test_training_leaves_the_predictor_alone(folder):
    """No parameters, no dropout: a tail in train mode gives the same score, and its gradient is the embedding's."""
    reward = AestheticReward.from_pretrained(record("aesthetic", folder, aesthetic_architecture()))
    pixels = reward_families.pixels(1)
    state = reward.head(pixels, None, 1)
    tail = Tail(reward, 2, reward.prefix(state)[0]).requires_grad_(True).train()
    assert not [name for name, _ in tail.named_parameters() if "predictor" in name]
    assert {name for name in tail.state_dict() if "predictor" in name}
    score = tail(reward.grid(state)).score
    torch.testing.assert_close(score, reward.resume(state, 1).score)
    score.sum().backward()
    assert float(tail.part.net.proj.grad.abs().sum()) > 0


def test_the_embedding_and_tokens_are_the_clips(folder):
    reward = AestheticReward.from_pretrained(record("aesthetic", folder, aesthetic_architecture()))
    clip = ClipReward.from_pretrained(families.clip_record(folder))
    images = torch.rand(2, 3, 40, 30)
    ours, theirs = reward.judge(images), clip.judge(images)
    assert torch.equal(ours.embedding, theirs.embedding)
    assert torch.equal(ours.tokens, theirs.tokens)


def test_every_part_is_in_eval_mode(folder):
    loaded = AestheticReward.from_pretrained(record("aesthetic", folder, aesthetic_architecture()))
    for reward in (loaded, AestheticReward.build(aesthetic_architecture())):
        assert not any(module.training for module in reward.modules())


def test_no_text_tower_is_kept(folder):
    reward = AestheticReward.from_pretrained(record("aesthetic", folder, aesthetic_architecture()))
    assert reward.companions is None
    with pytest.raises(ConfigError, match="images alone"):
        reward.encode_prompts(["a cat"])


def test_the_predictor_stays_in_float32(folder):
    settings = record("aesthetic", folder, aesthetic_architecture())
    exact, half = AestheticReward.from_pretrained(settings), AestheticReward.from_pretrained(
        settings, dtype=torch.bfloat16
    )  # fmt: skip
    assert half.net.predictor.layers[0].weight.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(half.judge(images).score, exact.judge(images).score, rtol=0.05, atol=0.05)


def test_folder_round_trip_through_a_single_file(folder):
    """A record may point at the CLIP's checkpoint itself; the predictor lies beside it."""
    by_file = record("aesthetic", folder / "open_clip_model.safetensors", aesthetic_architecture())
    by_folder = record("aesthetic", folder, aesthetic_architecture())
    pixels = torch.rand(1, 3, 28, 28)
    scores = [AestheticReward.from_pretrained(each).judge(pixels).score for each in (by_file, by_folder)]
    assert torch.equal(*scores)


def test_the_predictor_comes_from_a_repository_of_its_own(folder, monkeypatch):
    asked = []

    def resolve(source, **settings):
        asked.append((source.repo, source.filename, source.revision, "patterns" in settings))
        return folder / PREDICTOR if source.filename else folder

    monkeypatch.setattr("stitchvm.plugins.rewards.aesthetic.resolve_source", resolve)
    monkeypatch.setattr("stitchvm.plugins.rewards.openclip.resolve_source", resolve)
    architecture = aesthetic_architecture()
    architecture["predictor"] |= {"repo": "lab/predictor", "revision": "v1"}
    AestheticReward.from_pretrained(core.RewardRecord(name="x", family="aesthetic", repo="lab/clip", revision="v7",
                                                      architecture=architecture))  # fmt: skip
    assert asked[0] == ("lab/predictor", PREDICTOR, "v1", False)
    assert {entry[:3] for entry in asked[1:]} == {("lab/clip", None, "v7")}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ("gone", WeightsError, "there is no file 'sac"),
        ("truncated", WeightsError, "damaged"),
        ("relu", WeightsError, "unexpected .layers"),
        ("wide", WeightsError, "of the wrong shape"),
        ("no table", ConfigError, "needs a table 'predictor'"),
        ("no name", ConfigError, "'widths' and 'filename'"),
        ("other clip", ConfigError, "begin with the CLIP's embed_dim .12."),
        ("vector", ConfigError, "end with 1"),
    ],
)
def test_a_predictor_that_does_not_fit(tmp_path, change, error, said):
    reward_families.write_aesthetic(tmp_path, **({"after": nn.ReLU} if change == "relu" else {}))
    architecture = aesthetic_architecture()
    file = tmp_path / PREDICTOR
    if change == "gone":
        file.unlink()
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-500])
    elif change == "wide":
        torch.save(reward_families.AuthorsPredictor([12, 20, 8, 8, 4, 1]).state_dict(), file)
    elif change == "no table":
        del architecture["predictor"]
    elif change == "no name":
        del architecture["predictor"]["filename"]
    elif change == "other clip":
        architecture["predictor"] = {"widths": [768, 1], "filename": PREDICTOR}
    elif change == "vector":
        architecture["predictor"] = {"widths": [12, 3], "filename": PREDICTOR}
    with pytest.raises(error, match=said):
        AestheticReward.from_pretrained(record("aesthetic", tmp_path, architecture))


def test_another_file_than_the_published_one_is_refused(folder):
    """Of the same widths: no shape could tell. The hub repository is a copy, so its record names the digest."""
    file = folder / PREDICTOR
    architecture = aesthetic_architecture()
    architecture["predictor"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    AestheticReward.from_pretrained(record("aesthetic", folder, architecture))
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "layers.7.bias": tensors["layers.7.bias"] + 1}, file)
    with pytest.raises(WeightsError, match="not the file that was published"):
        AestheticReward.from_pretrained(record("aesthetic", folder, architecture))


def test_weights_of_the_other_activation_are_refused(folder):
    with pytest.raises(WeightsError, match="quick_gelu is True, expected False"):
        AestheticReward.from_pretrained(record("aesthetic", folder, aesthetic_architecture(quick_gelu=False)))


def test_the_record_is_the_published_pair():
    own = core.registry().reward("aesthetic").architecture
    clip = {name: value for name, value in own.items() if name not in ("predictor", "preprocess_cfg")}
    assert clip == open_clip.get_model_config("ViT-L-14-quickgelu")
    assert own["predictor"]["widths"] == [768, 1024, 128, 64, 16, 1]
    assert own["predictor"]["filename"] == PREDICTOR
    assert len(own["predictor"]["sha256"]) == 64
