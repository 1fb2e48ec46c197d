"""The SD3 family: its pipeline folder, its latents, its text and its time, against diffusers itself."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import attrs
import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

import families
from stitchvm.core import (
    LATENT,
    Condition,
    ConfigError,
    CostMeter,
    Denoiser,
    Head,
    NoiseLevelError,
    NoisyLatent,
    SliceError,
    WeightsError,
    build_twin,
    load_backbone,
    registry,
    sample,
)
from stitchvm.plugins.backbones.mmdit import MMDiTBackbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder whose transformer lies in several shards."""
    path = tmp_path_factory.mktemp("sd3")
    families.write_pipeline(path, shard_size="40KB")
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def backbone(folder: Path) -> MMDiTBackbone:
    return MMDiTBackbone.from_pretrained(families.pipeline_record(folder))


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


# -- loading ----------------------------------------------------------------------------------------------------------


def test_loaded_whole_it_is_the_pipelines_transformer(backbone, pipeline):
    x, condition = families.mmdit_input(backbone)
    output = backbone.resume(backbone.head(x, condition, 0), 0)
    upstream = pipeline.transformer(x.latents, condition["embeds"], condition["pooled"], x.sigma * 1000).sample
    assert torch.equal(output, upstream)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_loaded_by_name_of_a_folder(folder):
    loaded = load_backbone(str(folder), family="mmdit", cut=1)
    assert loaded.depth == 4
    assert loaded.record.path == str(folder)


@pytest.mark.parametrize("cut", [LATENT, 0, 1, 3, 4])
def test_loaded_as_a_head_it_equals_the_whole(backbone, folder, cut):
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    part = MMDiTBackbone.from_pretrained(families.pipeline_record(folder), cut=cut)
    x, condition = families.mmdit_input(backbone)
    assert torch.equal(Head(part, cut)(x, condition), Head(backbone, cut)(x, condition))
    wanted = Head(backbone, max(cut, 0)).part.net.state_dict()
    assert set(part.net.state_dict()) == set(wanted)
    assert not any(t.is_meta for t in part.net.state_dict().values())
    assert torch.equal(part.encode_prompts(["a"])["embeds"], backbone.encode_prompts(["a"])["embeds"])


def test_a_head_never_opens_the_shards_it_does_not_need(backbone, folder, tmp_path):
    copy = _copy(folder, tmp_path)
    index = json.loads((copy / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    head = ("pos_embed.", "time_text_embed.", "context_embedder.", "transformer_blocks.0.")
    needed = {home for name, home in index.items() if name.startswith(head)}
    for file in (copy / "transformer").glob("*.safetensors"):
        if file.name not in needed:
            file.unlink()
    part = MMDiTBackbone.from_pretrained(families.pipeline_record(copy), cut=1)
    x, condition = families.mmdit_input(backbone)
    assert torch.equal(Head(part, 1)(x, condition), Head(backbone, 1)(x, condition))
    with pytest.raises(WeightsError, match="does not exist"):
        MMDiTBackbone.from_pretrained(families.pipeline_record(copy))


def test_of_a_hub_repository_only_what_is_needed_is_fetched(folder, tmp_path, monkeypatch):
    hub, fetched = tmp_path / "snapshot", set()

    def snapshot(repo: str, *, allow_patterns: list[str], **_: object) -> str:
        assert repo == "org/sd3"
        for file in (f for f in folder.rglob("*") if f.is_file()):
            name = file.relative_to(folder).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.add(name)
                (hub / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, hub / name)
        return str(hub)

    def weights() -> set[str]:
        return {name.partition("/")[0] for name in fetched if name.endswith(".safetensors")}

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    record = attrs.evolve(families.pipeline_record(folder), path=None, repo="org/sd3")
    part = MMDiTBackbone.from_pretrained(record, cut=0)
    assert weights() == {"transformer"}
    shards = {name for name in fetched if name.startswith("transformer/") and name.endswith(".safetensors")}
    assert len(shards) < len(list((folder / "transformer").glob("*.safetensors")))
    part.decode_latents(torch.zeros(1, 4, 8, 8))
    assert weights() == {"transformer", "vae"}
    part.encode_prompts(["a"])
    assert weights() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    MMDiTBackbone.from_pretrained(record)


def test_dtype_is_the_records_unless_asked(folder):
    record = families.pipeline_record(folder, dtype="bfloat16")
    assert {t.dtype for t in MMDiTBackbone.from_pretrained(record).net.state_dict().values()} == {torch.bfloat16}
    part = MMDiTBackbone.from_pretrained(record, cut=0, dtype=torch.float16)
    assert {t.dtype for t in part.net.state_dict().values()} == {torch.float16}
    assert part.companions.vae(torch.device("cpu")).dtype == torch.float32


def test_bfloat16_is_close_to_float32(backbone, folder):
    half = MMDiTBackbone.from_pretrained(families.pipeline_record(folder, dtype="bfloat16"))
    latents = families.mmdit_input(backbone)[0].latents
    condition = families.mmdit_input(backbone)[1]
    ours = half.denoise(latents, 0.4, condition).velocity
    full = backbone.denoise(latents, 0.4, condition).velocity
    assert ours.dtype == torch.float32
    assert (ours - full).norm() / full.norm() < 0.05


def test_from_pipeline_shares_the_users_modules(pipeline, backbone):
    ours = MMDiTBackbone.from_pipeline(pipeline, max_sequence_length=3)
    assert ours.net is pipeline.transformer
    assert ours.companions.vae(torch.device("cpu")) is pipeline.vae
    assert torch.equal(ours.encode_prompts(["ab"])["embeds"], backbone.encode_prompts(["ab"])["embeds"])
    assert torch.equal(ours.sigmas(5, (8, 8)), backbone.sigmas(5, (8, 8)))
    with pytest.raises(WeightsError, match="StableDiffusion3Pipeline"):
        MMDiTBackbone.from_pipeline(object())


def _damaged(folder: Path, change: str, tmp_path: Path) -> Path:
    """A copy of the folder with one thing wrong with its transformer."""
    families.write_pipeline(tmp_path / "whole")
    copy = tmp_path / "whole"
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif change == "not safetensors":
        file.write_bytes(b"x" * 100)
    elif change == "gone":
        file.unlink()
    elif change == "pickle":
        file.rename(file.with_name("diffusion_pytorch_model.bin"))
    elif change == "missing tensor":
        save_file({n: t for n, t in tensors.items() if n != "transformer_blocks.0.attn.to_q.weight"}, file)
    elif change == "unexpected tensor":
        save_file(tensors | {"transformer_blocks.0.attn.extra": torch.ones(1)}, file)
    elif change == "wrong shape":
        save_file(tensors | {"pos_embed.proj.bias": torch.ones(3)}, file)
    else:
        config = copy / {"no config": "transformer/config.json", "no vae": "vae/config.json"}.get(
            change, "transformer/config.json"
        )
        content = json.loads(config.read_text())
        if change.startswith("no "):
            config.unlink()
        elif change == "broken json":
            config.write_text("{")
        else:
            other = {"num_layers": 5} if change == "other depth" else {"_class_name": "FluxTransformer2DModel"}
            config.write_text(json.dumps(content | other))
    return copy


@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("truncated", "truncated or damaged"),
        ("not safetensors", "truncated or damaged"),
        ("gone", "does not exist"),
        ("pickle", "can run code when read"),
        ("missing tensor", "1 missing .transformer_blocks.0.attn.to_q.weight"),
        ("unexpected tensor", "1 unexpected .transformer_blocks.0.attn.extra"),
        ("wrong shape", r"pos_embed.proj.bias: \[3\], expected \[16\]"),
        ("no config", "config.json does not exist"),
        ("no vae", "config.json does not exist"),
        ("broken json", "cannot be read as JSON"),
        ("other depth", "num_layers is 5, expected 4"),
        ("other class", "describes a FluxTransformer2DModel, expected a SD3Transformer2DModel"),
    ],
)
def test_damaged_checkpoints_give_one_clear_error(folder, tmp_path, change, said, cut):
    copy = _damaged(folder, change, tmp_path)
    with pytest.raises(WeightsError, match=said):
        MMDiTBackbone.from_pretrained(families.pipeline_record(copy), cut=cut)


def test_damaged_vae_and_text_encoders_are_reported_when_used(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    vae, text = copy / "vae/diffusion_pytorch_model.safetensors", copy / "text_encoder/model.safetensors"
    for file in (vae, text):
        file.write_bytes(file.read_bytes()[:-100])
    part = MMDiTBackbone.from_pretrained(families.pipeline_record(copy), cut=0)
    with pytest.raises(WeightsError, match="truncated or damaged"):
        part.decode_latents(torch.zeros(1, 4, 8, 8))
    with pytest.raises(WeightsError, match="text encoders"):
        part.encode_prompts(["a"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformers": {}}, "transformers"),
        ({"transformer": {"layers": 3}}, "layers"),
        ({"vae": {"channels": 3}}, "channels"),
        ({"scheduler": {"shft": 3}}, "shft"),
    ],
)
def test_an_architecture_with_an_unknown_setting(change, said):
    with pytest.raises(ConfigError, match=said):
        MMDiTBackbone.build(families.mmdit_architecture() | change)


# -- latents ----------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_and_shifted_as_the_vae_says(backbone, pipeline):
    images = torch.rand(2, 3, 16, 24)
    with CostMeter() as cost:
        latents = backbone.encode_images(images)
        decoded = backbone.decode_latents(latents)
    raw = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(latents, (raw - 0.0609) * 1.5305, rtol=1e-5, atol=1e-5)
    assert latents.shape == (2, 4, 8, 12)
    expected = pipeline.vae.decode(latents / 1.5305 + 0.0609).sample / 2 + 0.5
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    assert decoded.shape == images.shape
    assert (cost.passes["encoder"], cost.passes["decoder"]) == (2, 2)
    assert latents.dtype == decoded.dtype == torch.float32


def test_a_vae_without_shift():
    shiftless = {name: value for name, value in families.VAE.items() if name != "shift_factor"}
    backbone = MMDiTBackbone.build(families.mmdit_architecture() | {"vae": shiftless})
    assert backbone.companions.scale_and_shift == (1.5305, 0.0)


def test_decoding_is_differentiable(backbone):
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    backbone.decode_latents(latents).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_the_wrong_shape(backbone, shape):
    with pytest.raises(SliceError, match="multiples of 4"):
        backbone.encode_images(torch.zeros(shape))


def test_a_random_vae_is_the_same_every_time_and_disturbs_nothing():
    one, two, other = (families.mmdit(seed) for seed in (0, 0, 1))
    latents = torch.randn(1, 4, 8, 8)
    state = torch.random.get_rng_state()
    assert torch.equal(one.decode_latents(latents), two.decode_latents(latents))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(one.decode_latents(latents), other.decode_latents(latents))


# -- text -------------------------------------------------------------------------------------------------------------


def test_text_is_what_the_pipeline_encodes(backbone, pipeline):
    prompts = ["a ball", "", "blue"]
    condition = backbone.encode_prompts(prompts)
    # The pipeline itself needs its denoiser here: an absent T5 is zeros as wide as the denoiser reads.
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=3
    )
    assert torch.equal(condition["embeds"], embeds)
    assert torch.equal(condition["pooled"], pooled)
    assert condition["embeds"].shape == (3, 8 + 3, 24)
    assert not condition["embeds"].requires_grad
    torch.testing.assert_close(backbone.null_condition()["pooled"], pooled[1:2], rtol=1e-5, atol=1e-5)


def test_text_of_a_random_network_is_deterministic_and_tells_prompts_apart():
    backbone = families.mmdit()
    one, two = backbone.encode_prompts(["a red ball", "a blue ball"]), backbone.encode_prompts(["a red ball"])
    assert torch.equal(one["embeds"][:1], two["embeds"])
    assert torch.equal(one["pooled"][:1], two["pooled"])
    assert not torch.equal(one["embeds"][0], one["embeds"][1])
    assert one["embeds"].shape == (2, 77 + 3, 24)
    assert one["pooled"].shape == (2, 16)
    assert backbone.null_condition()["embeds"].shape == (1, 77 + 3, 24)


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_prompts_must_be_a_list(backbone, prompts):
    with pytest.raises(ConfigError, match="list of at least one prompt"):
        backbone.encode_prompts(prompts)


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 28])
def test_sigmas_are_the_pipelines(backbone, pipeline, steps):
    seen: list[float] = []
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a", height=16, width=16, num_inference_steps=steps, guidance_scale=1.0, max_sequence_length=3,
             output_type="latent", callback_on_step_end=lambda p, i, t, k: (seen.append(float(t)), k)[1])  # fmt: skip
    sigmas = backbone.sigmas(steps, (8, 8))
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    torch.testing.assert_close(sigmas[:-1] * 1000, torch.tensor(seen))


def test_dynamic_shifting_follows_the_latents_size():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 36}
    backbone = MMDiTBackbone.build(families.mmdit_architecture() | {"scheduler": settings})
    for sides in ((8, 8), (8, 12)):
        scheduler = FlowMatchEulerDiscreteScheduler(**settings)
        scheduler.set_timesteps(7, mu=calculate_shift(sides[0] * sides[1] // 4, 4, 36, 0.5, 1.15))
        assert torch.equal(backbone.sigmas(7, sides), scheduler.sigmas)
    assert not torch.equal(backbone.sigmas(7, (8, 8)), backbone.sigmas(7, (8, 12)))


def test_schedules_that_cannot_be_used():
    with pytest.raises(ConfigError, match="at least 1 step"):
        families.mmdit().sigmas(0, (8, 8))
    inverted = families.mmdit_architecture() | {"scheduler": {"invert_sigmas": True}}
    with pytest.raises(ConfigError, match="invert_sigmas"):
        MMDiTBackbone.build(inverted).sigmas(4, (8, 8))


def test_one_step_of_ours_is_one_step_of_the_pipelines(backbone, pipeline):
    """The whole convention at once: scaling of time, sign of the velocity, order of the levels."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("a red ball", height=16, width=16, num_inference_steps=4, guidance_scale=3.0, latents=noise,
                      max_sequence_length=3, output_type="latent").images  # fmt: skip
    denoiser = Denoiser(backbone, backbone.encode_prompts(["a red ball"]), backbone.null_condition(), 3.0)
    ours = sample(denoiser, noise, backbone.sigmas(4, (8, 8)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_latents_that_do_not_fit(backbone):
    _, condition = families.mmdit_input(backbone)
    with pytest.raises(SliceError, match="got .3, 16, 8, 8."):
        backbone.noisy(torch.zeros(3, 16, 8, 8), 0.5)
    for sides in ((7, 8), (8, 26)):
        with pytest.raises(SliceError, match="multiples of 2 and at most 24"):
            backbone.stem(NoisyLatent(torch.zeros(3, 4, *sides), torch.zeros(3)), condition)
    with pytest.raises(NoiseLevelError, match="0 clean, 1 pure noise"):
        backbone.noisy(torch.zeros(3, 4, 8, 8), 500.0)


def test_conditions_that_do_not_fit(backbone):
    x, condition = families.mmdit_input(backbone)
    wrong = [
        Condition(),
        Condition({"embeds": condition["embeds"]}),
        Condition({"embeds": condition["embeds"][..., :-1], "pooled": condition["pooled"]}),
    ]
    for given in wrong:
        with pytest.raises(SliceError, match="encode_prompts"):
            backbone.stem(x, given)
    with pytest.raises(SliceError, match="does not fit a batch of 3"):
        backbone.stem(x, condition.index([0, 1]))


def test_one_condition_serves_a_whole_batch(backbone):
    x, condition = families.mmdit_input(backbone)
    one = condition.index([0])
    torch.testing.assert_close(
        backbone.denoise(x.latents, x.sigma, one).velocity, backbone.denoise(x.latents, x.sigma, one.expand(3)).velocity
    )


def test_grid_keeps_rows_and_columns():
    """A latent that changes in one corner changes that corner's feature at cut 0, and no other."""
    backbone = families.mmdit()
    x, condition = families.mmdit_input(backbone)
    latents = x.latents.clone()
    latents[:, :, 0, -1] += 5
    moved = Head(backbone, 0)(NoisyLatent(latents, x.sigma), condition) - Head(backbone, 0)(x, condition)
    changed = moved.abs().amax(dim=(0, 1)) > 0
    assert changed.shape == (4, 6)
    assert changed.nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_ends_of_the_path_are_finite(sigma):
    backbone = families.mmdit()
    x, condition = families.mmdit_input(backbone)
    prediction = backbone.denoise(x.latents, sigma, condition)
    assert bool(prediction.z0.isfinite().all())
    assert bool(prediction.eps.isfinite().all())
    other = backbone.denoise(x.latents, 0.5, condition)
    assert not torch.allclose(prediction.velocity, other.velocity)


@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
def test_twins_run_from_prompt_to_picture(name):
    twin = build_twin(registry().backbone(name))
    side = twin.native_resolution // twin.latent_factor
    condition = twin.encode_prompts(["a cat", "a dog"])
    noise = torch.randn(2, twin.latent_channels, side, side)
    z0 = twin.denoise(noise, twin.sigmas(3, (side, side))[0], condition).z0
    images = twin.decode_latents(z0)
    assert images.shape == (2, 3, twin.native_resolution, twin.native_resolution)
    assert twin.encode_images(images.clamp(0, 1)).shape == noise.shape
