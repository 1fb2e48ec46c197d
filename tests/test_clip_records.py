"""The CLIP records beside the first one: transformers' layout (PickScore), timm towers (SigLIP 2), squashed images and
quickgelu (DFN); each against its own upstream."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image, to_tensor
from transformers import CLIPConfig, CLIPImageProcessor
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig

import families
import reward_families
from reward_families import record, transformers_architecture, write_transformers
from stitchvm import core
from stitchvm.core import ConfigError, SliceError, WeightsError, load_reward
from stitchvm.plugins.rewards import transformers_clip
from stitchvm.plugins.rewards.clip import ClipReward
from stitchvm.plugins.rewards.siglip import SiglipReward

# -- transformers' layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_a_clip_model_of_transformers_gives_its_own_embeddings_and_logits(tmp_path, act):
    model = write_transformers(tmp_path, act)
    reward = ClipReward.from_pretrained(record("clip", tmp_path, transformers_architecture(act)))
    pixels, prompts = reward_families.pixels(), ["a red ball", "a blue cube", "a cat"]
    tokens = open_clip.SimpleTokenizer(context_length=16)(prompts)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=tokens).pooler_output
        logits = model(input_ids=tokens, pixel_values=pixels).logits_per_image
        output = reward.resume(reward.head(pixels, None, 0), 0)
        condition = reward.condition(prompts)
    torch.testing.assert_close(output.embedding, image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(condition["text"], text / text.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward.score(output, condition), torch.diagonal(logits), rtol=1e-4, atol=1e-4)
    assert reward.score_scale == pytest.approx(torch.tensor(3.0).exp().item())


def test_every_cut_of_the_converted_tower_is_a_hidden_state_of_the_original(tmp_path):
    model = write_transformers(tmp_path)
    reward = ClipReward.from_pretrained(record("clip", tmp_path, transformers_architecture()))
    pixels = reward_families.pixels()
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        for cut in range(reward.depth + 1):
            torch.testing.assert_close(reward.head(pixels, None, cut), hidden[cut], rtol=1e-4, atol=1e-5)


def test_a_folder_of_transformers_needs_no_record(tmp_path):
    write_transformers(tmp_path)
    named = ClipReward.from_pretrained(record("clip", tmp_path, transformers_architecture(score="cosine")))
    loaded = load_reward(str(tmp_path), family="clip")
    pixels = reward_families.pixels()
    assert torch.equal(loaded.net(pixels), named.net(pixels))
    assert loaded.score_scale == 1.0


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_old_checkpoints_are_read(tmp_path, name):
    """Position ids were saved once, and weights in ``torch.save``'s format."""
    write_transformers(tmp_path / "new")
    tensors = load_file(tmp_path / "new/model.safetensors")
    for tower, count in (("vision", 17), ("text", 16)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(count)[None]
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "new/config.json").read_bytes())
    torch.save(tensors, old / name) if name.endswith("bin") else save_file(tensors, old / name)
    settings = [record("clip", tmp_path / where, transformers_architecture()) for where in ("old", "new")]
    pixels = reward_families.pixels()
    first, second = (ClipReward.from_pretrained(each).net(pixels) for each in settings)
    assert torch.equal(first, second)


def test_what_a_configuration_leaves_out_is_what_transformers_means():
    for ours, theirs in (
        (transformers_clip.VISION_DEFAULTS, CLIPVisionConfig()),
        (transformers_clip.TEXT_DEFAULTS, CLIPTextConfig()),
        ({"projection_dim": transformers_clip.PROJECTION_DEFAULT}, CLIPConfig()),
    ):
        assert ours == {name: getattr(theirs, name) for name in ours}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "1 missing .visual.ln_post.bias"),
        ("half attention", "only the projections k, v of q, k and v"),
        ("unexpected", "holds 'vision_model.extra', which a CLIPModel of transformers does not have"),
        ("stray layer", "no layer of a CLIPModel|does not have"),
        ("truncated", "truncated or damaged"),
        ("gone", "holds none of .*model.safetensors, pytorch_model.bin"),
        ("activation", "quick_gelu is True, expected False"),
        ("resolution", "vision_cfg.image_size is 56, expected 28"),
        ("two activations", "expected both 'gelu' or both 'quick_gelu'"),
        ("vocabulary", "a vocabulary of 100"),
        ("no crop", "switches do_center_crop off"),
        ("statistics", "preprocess_cfg.mean is .0.5, 0.5, 0.5., expected"),
    ],
)
def test_damaged_or_other_checkpoints_give_one_clear_error(tmp_path, change, said):
    write_transformers(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, content = load_file(file), json.loads(config.read_text())
    if change == "missing":
        del tensors["vision_model.post_layernorm.bias"]
    elif change == "half attention":
        del tensors["text_model.encoder.layers.1.self_attn.q_proj.bias"]
    elif change == "unexpected":
        tensors["vision_model.extra"] = torch.ones(1)
    elif change == "stray layer":
        tensors["vision_model.encoder.layers.x.mlp.fc1.bias"] = torch.ones(1)
    elif change == "activation":
        content["vision_config"]["hidden_act"] = content["text_config"]["hidden_act"] = "quick_gelu"
    elif change == "two activations":
        content["vision_config"]["hidden_act"] = "quick_gelu"
    elif change == "resolution":
        content["vision_config"]["image_size"] = 56
    elif change == "vocabulary":
        content["text_config"]["vocab_size"] = 100
    save_file(tensors, file)
    config.write_text(json.dumps(content))
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif change == "gone":
        file.unlink()
    elif change in ("no crop", "statistics"):
        settings = {"do_center_crop": False} if change == "no crop" else {"image_mean": [0.5] * 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073]}
    with pytest.raises(WeightsError, match=said):
        ClipReward.from_pretrained(record("clip", tmp_path, transformers_architecture(preprocess_cfg=statistics)))


@pytest.mark.parametrize("sides", [(28, 28), (60, 60), (28, 44), (80, 40)])
def test_preprocessing_follows_transformers(tmp_path, sides):
    """To two levels of 255 (it rounds to 8 bits and resizes by torchvision); an odd remainder of the crop may fall on
    the other side."""
    write_transformers(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    reward = ClipReward.from_pretrained(record("clip", tmp_path, transformers_architecture()))
    image = _picture(*sides)
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    ours = reward.preprocess(to_tensor(image)[None])[0]
    std = torch.tensor(processor.image_std)[:, None, None]
    assert ((ours - theirs) * std).abs().max() <= 2.05 / 255


def test_a_score_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="score is 'probability'; choose 'cosine' or 'logit'"):
        families.clip(score="probability")


def test_the_temperature_is_read_before_the_precision_is_reduced(tmp_path):
    write_transformers(tmp_path)
    reward = ClipReward.from_pretrained(record("clip", tmp_path, transformers_architecture()), dtype=torch.bfloat16)
    assert reward.score_scale == pytest.approx(torch.tensor(3.0).exp().item())


# -- SigLIP -----------------------------------------------------------------------------------------------------------


def _picture(height: int, width: int) -> Image.Image:
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 1, width)[None].expand(height, width)
    noise = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    return to_pil_image(torch.stack([rows, (columns > 0.4).float(), 0.5 * columns + 0.5 * noise]))


def test_siglip_is_open_clips(tmp_path):
    """A published folder: open_clip's own model, transform and tokenizer give the same score."""
    reward_families.write_siglip(tmp_path)
    reward = SiglipReward.from_pretrained(record("siglip", tmp_path))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    images, prompts = [_picture(28, 28), _picture(60, 40)], ["a red ball", "a Blue, cube!"]
    given = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        picture, text = model.encode_image(given), model.encode_text(tokenizer(prompts), normalize=True)
        output = reward.resume(reward.head(given, None, 0), 0)
        condition = reward.condition(prompts)
        score = torch.cat([reward.judge(to_tensor(image)[None]).embedding for image in images])
    assert torch.equal(output.embedding, picture)
    torch.testing.assert_close(condition["text"], text, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score, picture, rtol=1e-2, atol=1e-2)
    cosine = torch.cosine_similarity(picture, text)
    torch.testing.assert_close(reward.score(output, condition), cosine, rtol=1e-4, atol=1e-6)
    assert torch.equal(tokenizer(["a Blue, cube!"]), tokenizer(["a blue cube"])), "canonicalized"


def test_siglip_has_no_prefix_and_is_pooled_by_attention():
    reward = reward_families.siglip()
    assert reward.prefix_count == 0
    assert type(reward.net.attn_pool).__name__ == "AttentionPoolLatent"
    pixels = reward_families.pixels()
    tokens = reward.resume(reward.head(pixels, None, 1), 1).tokens
    assert torch.equal(tokens, reward.net.forward_features(pixels))


def test_siglip_of_another_size_or_tower_is_refused(tmp_path):
    reward_families.write_siglip(tmp_path)
    file = tmp_path / "open_clip_config.json"
    content = json.loads(file.read_text())
    content["model_cfg"]["vision_cfg"]["image_size"] = 56
    file.write_text(json.dumps(content))
    with pytest.raises(SliceError, match="56.* pixels, but its timm model reads 28"):
        SiglipReward.from_pretrained(record("siglip", tmp_path))
    with pytest.raises(SliceError, match="not VisionTransformer; use the family 'clip'"):
        SiglipReward.build(families.clip_architecture())
    with pytest.raises(SliceError, match="use the family 'siglip'"):
        ClipReward.build(content["model_cfg"])
    with pytest.raises(ConfigError, match="timm_args: .*wings"):
        reward_families.siglip(timm_args={"wings": 2})


def test_a_tokenizer_that_is_missing(tmp_path):
    reward_families.write_siglip(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    reward = SiglipReward.from_pretrained(record("siglip", tmp_path))
    with pytest.raises(WeightsError, match="the tokenizer in .* cannot be read"):
        reward.encode_prompts(["a cat"])


# -- the records ------------------------------------------------------------------------------------------------------


def test_a_folder_without_preprocessing_takes_the_records(tmp_path):
    """Of a DFN CLIP: what the folder leaves out must not become open_clip's default, a centre crop."""
    families.write_clip(tmp_path)
    config = tmp_path / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5]}
    config.write_text(json.dumps(content))
    squash = families.clip_architecture(preprocess_cfg={"resize_mode": "squash"})
    reward = ClipReward.from_pretrained(families.clip_record(tmp_path, architecture=squash))
    assert (reward._transform.resize_mode, reward._transform.mean) == ("squash", (0.5, 0.5, 0.5))
    shortest = families.clip_architecture(preprocess_cfg={"mean": [0.4, 0.4, 0.4]})
    with pytest.raises(WeightsError, match="preprocess_cfg.mean is .0.5, 0.5, 0.5., expected"):
        ClipReward.from_pretrained(families.clip_record(tmp_path, architecture=shortest))


PACKAGED = {
    "clip-vit-l-14": ("ViT-L-14-quickgelu", "openai", 427_616_513),
    "clip-vit-l-14-336": ("ViT-L-14-336-quickgelu", "openai", 427_944_193),
    "dfn-clip-vit-h-14-378": ("ViT-H-14-378-quickgelu", "dfn5b", 986_714_881),
    "pickscore": ("ViT-H-14", "laion2b_s32b_b79k", 986_109_441),
    "siglip2-so400m-14-378": ("ViT-SO400M-14-SigLIP2-378", "webli", 1_136_008_498),
}
"""The model that open_clip ships a configuration of, a tag with the same transform, and all its parameters."""


@pytest.mark.parametrize("name", PACKAGED)
def test_the_records_are_the_packaged_models(name):
    model, tag, parameters = PACKAGED[name]
    entry = core.registry().reward(name)
    own = {key: value for key, value in entry.architecture.items() if key not in ("preprocess_cfg", "score")}
    assert own == open_clip.get_model_config(model)
    published = open_clip.get_pretrained_cfg(model, tag)
    assert bool(published.get("quick_gelu")) == bool(own.get("quick_gelu"))
    preprocess = entry.architecture["preprocess_cfg"]
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert [preprocess[key]] == [list(published[key]) if isinstance(published[key], tuple) else published[key]]
    if entry.family != "clip" or name != "pickscore":
        assert published["hf_hub"].rstrip("/") == entry.repo
    reward = core.build_geometry(entry)
    assert reward.companions is not None
    text = sum(p.numel() for p in reward.companions.model.parameters())
    assert sum(p.numel() for p in reward.parameters()) + text == parameters


def test_pickscore_is_scored_on_the_published_scale():
    entry = core.registry().reward("pickscore")
    assert entry.architecture["score"] == "logit"
    twin = core.build_twin(entry)
    assert twin.score_scale == pytest.approx(1 / 0.07, rel=1e-5)  # where open_clip starts
    assert timm.is_model(core.registry().reward("siglip2-so400m-14-378").architecture["vision_cfg"]["timm_model_name"])
