"""The SD3 family: its latents, its text and its time, against diffusers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import families
from pipelines import add_t5, open_pipeline, pipeline_record, write_pipeline
from stitchvm.core import (
    Condition,
    ConfigError,
    CostMeter,
    Denoiser,
    Head,
    NoiseLevelError,
    NoisyLatent,
    SliceError,
    build_twin,
    registry,
    sample,
)
from stitchvm.plugins.backbones.mmdit import MMDiTBackbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3")
    write_pipeline(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3Pipeline:
    return open_pipeline(folder)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> MMDiTBackbone:
    return MMDiTBackbone.from_pretrained(pipeline_record(folder))


# -- settings ---------------------------------------------------------------------------------------------------------


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


def test_the_third_text_encoder_is_read_where_there_is_one(tmp_path):
    write_pipeline(tmp_path)
    add_t5(tmp_path)
    backbone, pipeline = MMDiTBackbone.from_pretrained(pipeline_record(tmp_path), cut=0), open_pipeline(tmp_path)
    condition = backbone.encode_prompts(["a ball", ""])
    embeds, _, pooled, _ = pipeline.encode_prompt(
        ["a ball", ""], None, None, do_classifier_free_guidance=False, max_sequence_length=3
    )
    assert bool((embeds[:, 8:] != 0).any())
    assert torch.equal(condition["embeds"], embeds)
    assert torch.equal(condition["pooled"], pooled)


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


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_twins_run_from_prompt_to_picture(name):
    twin = build_twin(registry().backbone(name))
    side = twin.native_resolution // twin.latent_factor
    condition = twin.encode_prompts(["a cat", "a dog"])
    noise = torch.randn(2, twin.latent_channels, side, side)
    z0 = twin.denoise(noise, twin.sigmas(3, (side, side))[0], condition).z0
    images = twin.decode_latents(z0)
    assert images.shape == (2, 3, twin.native_resolution, twin.native_resolution)
    assert twin.encode_images(images.clamp(0, 1)).shape == noise.shape
