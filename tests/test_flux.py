"""The FLUX family: packing, positions, embedded guidance, text and time, against diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import FluxPipeline

import families
from pipelines import open_pipeline, pipeline_record, write_pipeline
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
from stitchvm.plugins.backbones.flux import FluxBackbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    write_pipeline(path, "flux")
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> FluxPipeline:
    return open_pipeline(folder, "flux")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> FluxBackbone:
    return FluxBackbone.from_pretrained(pipeline_record(folder, "flux"))


def _velocity(backbone: FluxBackbone, sigma: float = 0.4) -> torch.Tensor:
    x, condition = families.flux_input(backbone)
    return backbone.denoise(x.latents, sigma, condition).velocity


# -- latents and positions --------------------------------------------------------------------------------------------


def test_tokens_and_positions_are_the_pipelines(backbone):
    """Packing and rotary ids, read off what reaches the network's own modules."""
    x, condition = families.flux_input(backbone)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        for name, module in (("tokens", backbone.net.x_embedder), ("ids", backbone.net.pos_embed))
    ]
    backbone.stem(x, condition)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["tokens"], FluxPipeline._pack_latents(x.latents, 3, 4, 8, 12))
    image = FluxPipeline._prepare_latent_image_ids(3, 4, 6, x.latents.device, torch.float32)
    assert torch.equal(seen["ids"], torch.cat([torch.zeros(5, 3), image]))


def test_latents_are_scaled_and_shifted_as_the_vae_says(backbone, pipeline):
    images = torch.rand(2, 3, 16, 24)
    with CostMeter() as cost:
        latents = backbone.encode_images(images)
        decoded = backbone.decode_latents(latents)
    raw = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(latents, (raw - 0.1159) * 0.3611, rtol=1e-5, atol=1e-5)
    expected = pipeline.vae.decode(latents / 0.3611 + 0.1159).sample / 2 + 0.5
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    assert latents.shape == (2, 4, 8, 12)
    assert (cost.passes["encoder"], cost.passes["decoder"]) == (2, 2)


def test_grid_keeps_rows_and_columns(backbone):
    """A latent that changes in one corner changes that corner's feature at cut 0, and no other."""
    x, condition = families.flux_input(backbone)
    latents = x.latents.clone()
    latents[:, :, 0, -1] += 5
    moved = Head(backbone, 0)(NoisyLatent(latents, x.sigma), condition) - Head(backbone, 0)(x, condition)
    assert (moved.abs().amax(dim=(0, 1)) > 0).nonzero().tolist() == [[0, 5]]


# -- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_is_the_pipelines_unless_it_is_set(folder, backbone):
    assert backbone.guidance == 3.5
    architecture = families.flux_architecture()
    set_in_record = pipeline_record(folder, "flux", architecture=architecture | {"guidance": 1.0})
    other = FluxBackbone.from_pretrained(set_in_record)
    assert other.guidance == 1.0
    assert FluxBackbone.build(architecture | {"guidance": 1.0}).guidance == 1.0
    x, condition = families.flux_input(backbone)
    theirs = backbone.net(
        hidden_states=FluxPipeline._pack_latents(x.latents, 3, 4, 8, 12),
        encoder_hidden_states=condition["embeds"],
        pooled_projections=condition["pooled"],
        timestep=x.sigma,
        img_ids=FluxPipeline._prepare_latent_image_ids(3, 4, 6, x.latents.device, torch.float32),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full([3], 1.0),
    ).sample
    ours = other.resume(other.head(x, condition, 0), 0)
    assert torch.equal(ours, FluxPipeline._unpack_latents(theirs, 16, 24, 2))
    assert not torch.allclose(_velocity(other), _velocity(backbone))


def test_a_network_without_guidance_takes_none():
    assert families.flux(guidance_embeds=False).guidance is None
    architecture = families.flux_architecture(guidance_embeds=False) | {"guidance": 3.5}
    with pytest.raises(ConfigError, match="guidance is 3.5, but this FLUX has no guidance embedding"):
        FluxBackbone.build(architecture)


@pytest.mark.parametrize("channels", [{"in_channels": 24}, {"in_channels": 16, "out_channels": 24}])
def test_variants_that_read_more_than_the_latents(channels):
    with pytest.raises(ConfigError, match="a FLUX that reads more than the latents"):
        families.flux(**channels)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"transformers": {}}, "transformers"), ({"transformer": {"layers": 3}}, "layers"), ({"steps": 3}, "steps")],
)
def test_an_architecture_with_an_unknown_setting(change, said):
    with pytest.raises(ConfigError, match=said):
        FluxBackbone.build(families.flux_architecture() | change)


# -- text -------------------------------------------------------------------------------------------------------------


def test_text_is_what_the_pipeline_encodes(backbone, pipeline):
    prompts = ["a ball", "", "blue"]
    condition = backbone.encode_prompts(prompts)
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=6)
    assert torch.equal(condition["embeds"], embeds)
    assert torch.equal(condition["pooled"], pooled)
    assert condition["embeds"].shape == (3, 6, 24)
    assert not condition["embeds"].requires_grad
    null, (embeds, pooled, _) = backbone.null_condition(), pipeline.encode_prompt([""], None, max_sequence_length=6)
    assert torch.equal(null["embeds"], embeds)
    assert torch.equal(null["pooled"], pooled)


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_prompts_must_be_a_list(backbone, prompts):
    with pytest.raises(ConfigError, match="list of at least one prompt"):
        backbone.encode_prompts(prompts)


# -- time -------------------------------------------------------------------------------------------------------------


def _times(pipeline: FluxPipeline, steps: int, sides: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """The times that the network reads in a run of the pipeline: noise levels, not thousandths of them."""
    seen: list[float] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append(float(given["timestep"][0])), with_kwargs=True
    )
    pipeline(
        "a", height=sides[0], width=sides[1], num_inference_steps=steps, max_sequence_length=6, output_type="latent"
    )
    hook.remove()
    return torch.tensor(seen)


def test_sigmas_are_the_times_the_pipelines_network_reads(backbone, pipeline):
    for steps, sides in ((1, (16, 16)), (7, (16, 16)), (7, (16, 24))):
        sigmas = backbone.sigmas(steps, (sides[0] // 2, sides[1] // 2))
        assert sigmas[-1] == 0
        torch.testing.assert_close(sigmas[:-1], _times(pipeline, steps, sides))
    assert not torch.equal(backbone.sigmas(7, (8, 8)), backbone.sigmas(7, (8, 12))), "shifted with the latents' size"


def test_schnells_levels_are_not_shifted(pipeline):
    """One to four even steps; what its published scheduler settings give in the pipeline."""
    plain = {"shift": 1.0, "use_dynamic_shifting": False}
    backbone = FluxBackbone.build(families.flux_architecture(guidance_embeds=False) | {"scheduler": plain})
    torch.testing.assert_close(backbone.sigmas(4, (8, 8)), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    theirs = FluxPipeline.from_pipe(pipeline, scheduler=type(pipeline.scheduler)(**plain))
    torch.testing.assert_close(backbone.sigmas(4, (8, 8))[:-1], _times(theirs, 4))


def test_time_is_rounded_where_upstream_rounds_it(folder):
    """In bfloat16 the time is cast before it is multiplied: 0.565 is read as 568, as the generator does; not 564."""
    half = FluxBackbone.from_pretrained(pipeline_record(folder, "flux", dtype="bfloat16"))
    x, condition = families.flux_input(half)
    x = NoisyLatent(x.latents.bfloat16(), torch.full((3,), 0.565))
    condition = condition.to("cpu", torch.bfloat16)
    ours = half.resume(half.head(x, condition, 0), 0)
    assert torch.equal(ours, families.flux_upstream(half, attrs.evolve(x, sigma=x.sigma.bfloat16()), condition))


def test_sampling_is_the_pipelines(backbone, pipeline):
    """The whole convention at once: packing, scale of time, guidance, sign of the velocity, order of the levels."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    packed = FluxPipeline._pack_latents(noise, 1, 4, 8, 8)
    theirs = pipeline("a red ball", height=16, width=16, num_inference_steps=4, guidance_scale=3.5, latents=packed,
                      max_sequence_length=6, output_type="latent").images  # fmt: skip
    denoiser = Denoiser(backbone, backbone.encode_prompts(["a red ball"]), backbone.null_condition())
    ours = sample(denoiser, noise, backbone.sigmas(4, (8, 8)))
    torch.testing.assert_close(ours, FluxPipeline._unpack_latents(theirs, 16, 16, 2), rtol=1e-4, atol=1e-4)


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit(backbone):
    x, condition = families.flux_input(backbone)
    with pytest.raises(SliceError, match="multiples of 2, got .7, 8."):
        backbone.stem(NoisyLatent(torch.zeros(3, 4, 7, 8), x.sigma), condition)
    with pytest.raises(SliceError, match="got .3, 16, 8, 8."):
        backbone.noisy(torch.zeros(3, 16, 8, 8), 0.5)
    with pytest.raises(NoiseLevelError, match="0 clean, 1 pure noise"):
        backbone.noisy(x.latents, 1000.0)
    for wrong in (Condition(), Condition({"embeds": condition["embeds"]})):
        with pytest.raises(SliceError, match="encode_prompts"):
            backbone.stem(x, wrong)
    with pytest.raises(SliceError, match="multiples of 4"):
        backbone.encode_images(torch.zeros(1, 3, 18, 16))


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_ends_of_the_path_are_finite(backbone, sigma):
    x, condition = families.flux_input(backbone)
    prediction: Any = backbone.denoise(x.latents, sigma, condition)
    assert bool(prediction.z0.isfinite().all() and prediction.eps.isfinite().all())


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_twins_run_from_prompt_to_picture(name):
    twin = build_twin(registry().backbone(name))
    side = twin.native_resolution // twin.latent_factor
    noise = torch.randn(2, twin.latent_channels, side, side)
    z0 = twin.denoise(noise, twin.sigmas(3, (side, side))[0], twin.encode_prompts(["a cat", "a dog"])).z0
    images = twin.decode_latents(z0)
    assert images.shape == (2, 3, twin.native_resolution, twin.native_resolution)
    assert twin.encode_images(images.clamp(0, 1)).shape == noise.shape
