"""The UNet family: discrete time, what is predicted, SDXL's added conditions, text and latents, against diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from pipelines import open_pipeline, pipeline_record, write_pipeline
from stitchvm.core import (
    Condition,
    ConfigError,
    CostMeter,
    Denoiser,
    NoiseLevelError,
    NoisyLatent,
    SliceError,
    backbone_from,
    build_twin,
    registry,
    sample,
)
from stitchvm.plugins.backbones.discrete_time import DiscreteTime
from stitchvm.plugins.backbones.unet import UNetBackbone

UNETS = ["sd", "xl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in UNETS}
    for kind, path in paths.items():
        write_pipeline(path, kind)
    return paths


@pytest.fixture(scope="module")
def pipelines(folders) -> dict[str, Any]:
    return {kind: open_pipeline(folder, kind) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def backbones(folders) -> dict[str, UNetBackbone]:
    return {kind: UNetBackbone.from_pretrained(pipeline_record(path, kind)) for kind, path in folders.items()}


def _time(**settings: Any) -> DiscreteTime:
    return DiscreteTime.of(diffusers.DDIMScheduler(**families.SD_SCHEDULE | settings))


# -- time -------------------------------------------------------------------------------------------------------------


def test_trained_levels_are_whole_timesteps():
    time, steps = _time(), torch.arange(1000)
    alphas = diffusers.DDIMScheduler(**families.SD_SCHEDULE).alphas_cumprod
    torch.testing.assert_close(time.sigmas.square() + alphas, torch.ones(1000))
    assert torch.equal(time.timestep(time.sigmas), steps.float())
    assert torch.equal(time.sigma(steps), time.sigmas)
    assert time.highest == pytest.approx(0.9977, abs=1e-4)


def test_levels_between_and_beyond_the_trained_ones():
    time = _time()
    between = torch.tensor([0.5, 12.25, 998.9])
    torch.testing.assert_close(time.timestep(time.sigma(between)), between, rtol=0, atol=2e-3)
    torch.testing.assert_close(time.sigma(torch.tensor(0.5)), time.sigmas[:2].mean())
    assert time.timestep(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]
    assert torch.equal(time.sigma(torch.tensor([-3.0, 5000.0])), time.sigmas[[0, -1]])


def test_a_schedule_with_zero_terminal_signal_stays_below_one():
    time = _time(rescale_betas_zero_snr=True)
    assert 0.999 < time.highest < 1
    # float32 cannot tell the last two levels apart
    torch.testing.assert_close(time.timestep(time.sigmas), torch.arange(1000).float(), rtol=0, atol=1)
    assert torch.equal(time.timestep(time.sigmas[:990]), torch.arange(990).float())


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(**families.SD_SCHEDULE),
        diffusers.DDIMScheduler(**families.SD_SCHEDULE, timestep_spacing="trailing"),
        diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True),
        diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
    ],
    ids=["ddim-leading", "ddim-trailing", "pndm", "euler"],
)
def test_the_grid_is_where_the_scheduler_goes(scheduler, steps):
    time = DiscreteTime.of(scheduler)
    grid = time.grid(steps)
    scheduler.set_timesteps(steps)
    visited = list(dict.fromkeys(float(step) for step in scheduler.timesteps))
    assert len(grid) == steps + 1
    assert grid[-1] == 0
    torch.testing.assert_close(time.timestep(grid[:-1]), torch.tensor(visited), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no variance preserving"),
        (diffusers.DDIMScheduler(prediction_type="sample"), "prediction_type is 'sample'; expected one of epsilon"),
        (object(), "object has no variance preserving schedule"),
    ],
    ids=["flow", "sample", "object"],
)
def test_schedulers_that_cannot_be_used(scheduler, said):
    with pytest.raises(ConfigError, match=said):
        DiscreteTime.of(scheduler)


def test_schedules_that_cannot_be_walked():
    for steps, said in ((0, "at least 1 step"), (2000, "take fewer|cannot take")):
        with pytest.raises(ConfigError, match=said):
            families.unet().sigmas(steps, (8, 8))
    with pytest.raises(ConfigError, match="_class_name is 'NoScheduler', which diffusers does not have"):
        DiscreteTime.from_config({"_class_name": "NoScheduler"})


@pytest.mark.parametrize("kind", UNETS)
def test_the_network_reads_the_pipelines_own_timesteps(pipelines, kind):
    """Whole steps from 0 to 999, not noise levels: what reaches the upstream network in a run of each."""
    pipeline = pipelines[kind]
    backbone = backbone_from(pipeline)
    seen: list[float] = []

    def note(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(float(given[0].flatten()[0]))

    hook = backbone.net.time_proj.register_forward_pre_hook(note)
    pipeline("a", height=16, width=16, num_inference_steps=5, guidance_scale=1.0, output_type="latent")
    theirs = list(dict.fromkeys(seen))  # PNDM reads its second timestep twice
    seen.clear()
    for sigma in backbone.sigmas(5, (8, 8))[:-1]:
        backbone.denoise(torch.zeros(1, 4, 8, 8), sigma, backbone.null_condition())
    hook.remove()
    assert len(theirs) == 5
    assert all(step == round(step) for step in theirs)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(theirs), rtol=0, atol=2e-3)


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predictions_are_the_schedulers(prediction):
    """Clean latent and noise of every sample, at a level of its own, as ``DDIMScheduler.step`` estimates them."""
    settings = families.SD_SCHEDULE | {"prediction_type": prediction}
    torch.manual_seed(0)
    backbone = UNetBackbone.build(families.unet_architecture() | {"scheduler": settings})
    scheduler = diffusers.DDIMScheduler(**settings)
    scheduler.set_timesteps(10)
    x, condition = families.unet_input(backbone)
    steps = torch.tensor([1, 301, 901])
    ours = backbone.denoise(x.latents, backbone.time.sigma(steps), condition)
    output = backbone.net(x.latents, steps, encoder_hidden_states=condition["embeds"]).sample
    for row, step in enumerate(steps.tolist()):
        z0 = scheduler.step(output[row], step, x.latents[row]).pred_original_sample
        alpha, sigma = scheduler.alphas_cumprod[step].sqrt(), (1 - scheduler.alphas_cumprod[step]).sqrt()
        torch.testing.assert_close(ours.z0[row], z0, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.eps[row], (x.latents[row] - alpha * z0) / sigma, rtol=1e-3, atol=1e-3)
    assert backbone.prediction == {"epsilon": "epsilon", "v_prediction": "v"}[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", UNETS)
def test_sampling_is_the_pipelines(folders, kind, prediction):
    """The whole convention at once: scale of time, guidance, null prompt, sizes, order of the levels."""
    pipeline = open_pipeline(folders[kind], kind)
    kept = {"sd": diffusers.DDIMScheduler, "xl": diffusers.EulerDiscreteScheduler}[kind]
    ends = {"set_alpha_to_one": True, "clip_sample": False} if kind == "sd" else {}
    pipeline.scheduler = kept.from_config(pipeline.scheduler.config, prediction_type=prediction, **ends)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("a red ball", height=16, width=16, num_inference_steps=4, guidance_scale=3.0,
                      latents=noise.clone(), output_type="latent").images  # fmt: skip
    backbone = backbone_from(pipeline)
    denoiser = Denoiser(backbone, backbone.encode_prompts(["a red ball"]), backbone.null_condition(), 3.0)
    ours = sample(denoiser, noise, backbone.sigmas(4, (8, 8)))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_pure_noise_is_read_at_the_last_trained_level(backbones):
    backbone = backbones["sd"]
    x, condition = families.unet_input(backbone)
    top, last = (backbone.denoise(x.latents, level, condition) for level in (1.0, backbone.time.highest))
    assert torch.equal(top.z0, last.z0)
    assert torch.equal(top.sigma, torch.full((3,), backbone.time.highest))
    assert bool(top.z0.isfinite().all() and top.velocity.isfinite().all())
    with pytest.raises(NoiseLevelError, match="0 clean, 1 pure noise"):
        backbone.denoise(x.latents, 999.0, condition)


# -- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNETS)
def test_text_is_what_the_pipeline_encodes(backbones, pipelines, kind):
    prompts = ["a ball", "", "blue"]
    condition = backbones[kind].encode_prompts(prompts)
    theirs = pipelines[kind].encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(condition["embeds"], theirs[0])
    if kind == "xl":
        assert torch.equal(condition["pooled"], theirs[2])
    assert set(condition.tensors) == ({"embeds"} if kind == "sd" else {"embeds", "pooled"})
    assert not condition["embeds"].requires_grad


@pytest.mark.parametrize("kind", UNETS)
def test_null_is_what_the_pipelines_guidance_starts_from(backbones, pipelines, kind):
    null = backbones[kind].null_condition()
    theirs = pipelines[kind].encode_prompt(
        ["x"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert torch.equal(null["embeds"], theirs[1])
    if kind == "xl":
        assert torch.equal(null["pooled"], theirs[3])
        assert not null["embeds"].any()


def test_sdxl_may_encode_its_null_prompt(folders, tmp_path):
    write_pipeline(tmp_path, "xl")
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_zeros_for_empty_prompt": False}))
    backbone = UNetBackbone.from_pretrained(pipeline_record(tmp_path, "xl"), cut=0)
    assert torch.equal(backbone.null_condition()["embeds"], backbone.encode_prompts([""])["embeds"])
    assert backbone.null_condition()["embeds"].any()


def test_sizes_are_those_of_the_latents_unless_given(backbones):
    backbone = backbones["xl"]
    x, condition = families.unet_input(backbone)
    ids = torch.tensor([[16, 24, 0, 0, 16, 24]] * 3)
    given = [Condition({**condition.tensors, "time_ids": wanted}) for wanted in (ids, ids * 2)]
    plain, same, larger = (backbone.resume(backbone.head(x, text, 0), 0) for text in (condition, *given))
    assert torch.equal(plain, same)
    added = {"text_embeds": condition["pooled"], "time_ids": ids * 2}
    steps = backbone.time.timestep(x.sigma)
    theirs = backbone.net(x.latents, steps, encoder_hidden_states=condition["embeds"], added_cond_kwargs=added).sample
    assert torch.equal(larger, theirs)
    assert not torch.allclose(plain, larger)


def test_inputs_that_do_not_fit(backbones):
    x, condition = families.unet_input(backbones["xl"])
    wrong = [Condition(), Condition({"embeds": condition["embeds"]})]
    wrong.append(Condition({**condition.tensors, "time_ids": torch.zeros(3, 5)}))
    for text in wrong:
        with pytest.raises(SliceError, match="time_ids.*use encode_prompts"):
            backbones["xl"].stem(x, text)
    with pytest.raises(SliceError, match="use encode_prompts"):
        backbones["sd"].stem(x, condition)
    with pytest.raises(SliceError, match="got .3, 16, 8, 8."):
        backbones["sd"].noisy(torch.zeros(3, 16, 8, 8), 0.5)
    with pytest.raises(ConfigError, match="list of at least one prompt"):
        backbones["sd"].encode_prompts([])


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("sides", [(7, 9), (8, 10), (16, 6)])
def test_sides_that_are_no_multiples_of_the_deepest_cell(backbones, kind, sides):
    backbone = backbones[kind]
    x, condition = families.unet_input(backbone, sides=sides)
    upstream = families.unet_upstream(backbone, x, condition)
    for cut in range(backbone.depth + 1):
        assert torch.equal(backbone.resume(backbone.head(x, condition, cut), cut), upstream), cut


def test_freeu_of_the_pipeline_is_kept(folders):
    """Switched on in the pipeline, it changes the network's up blocks; a cut before them is left as it was."""
    pipeline = open_pipeline(folders["sd"], "sd")
    backbone = backbone_from(pipeline)
    x, condition = families.unet_input(backbone)
    plain = families.unet_upstream(backbone, x, condition)
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    state = backbone.head(x, condition, backbone.depth - 1)
    before = state.sample.clone()
    upstream = families.unet_upstream(backbone, x, condition)
    for cut in range(backbone.depth + 1):
        assert torch.equal(backbone.resume(backbone.head(x, condition, cut), cut), upstream), cut
    backbone.resume(state, backbone.depth - 1)
    assert torch.equal(state.sample, before)
    assert not torch.allclose(plain, upstream)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"in_channels": 9}, "in_channels = 9 with out_channels = 4"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim = 8"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]}, "a AttnDownBlock2D"),
        ({"layers": 3}, "layers"),
        ({"down_block_types": ["NoSuchBlock"] * 3}, "NoSuchBlock"),
    ],
)
def test_networks_that_cannot_be_cut(settings, said):
    with pytest.raises(ConfigError, match=said):
        families.unet(**settings)


# -- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNETS)
def test_latents_are_scaled_as_the_vae_says(backbones, pipelines, kind):
    backbone, vae = backbones[kind], pipelines[kind].vae
    images = torch.rand(2, 3, 16, 24)
    with CostMeter() as cost:
        latents = backbone.encode_images(images)
        decoded = backbone.decode_latents(latents)
    raw = vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(latents, raw * 0.18215, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded, vae.decode(latents / 0.18215).sample / 2 + 0.5, rtol=1e-5, atol=1e-5)
    assert (cost.passes["encoder"], cost.passes["decoder"]) == (2, 2)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_an_early_vae_checkpoint(backbones, tmp_path):
    """Stable Diffusion 1's names its attention's layers in the old way and leaves the scaling factor to the class."""
    write_pipeline(tmp_path, "sd")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, early in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{early}.")
        return name

    tensors = {rename(name): tensor.clone() for name, tensor in load_file(file).items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, file)
    _rewrite(tmp_path / "vae/config.json", lambda c: {n: v for n, v in c.items() if n != "scaling_factor"})
    backbone = UNetBackbone.from_pretrained(pipeline_record(tmp_path, "sd"), cut=0)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(backbone.encode_images(images), backbones["sd"].encode_images(images))


def test_a_vae_that_normalises_every_channel(tmp_path):
    write_pipeline(tmp_path, "xl")
    _rewrite(tmp_path / "vae/config.json", lambda c: c | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
    with pytest.raises(ConfigError, match="latents_mean"):
        UNetBackbone.from_pretrained(pipeline_record(tmp_path, "xl"))


def test_a_half_precision_vae_that_overflows_is_copied(folders):
    pipeline = open_pipeline(folders["xl"], "xl")
    pipeline.vae.half()
    backbone = backbone_from(pipeline)
    vae = backbone.companions.vae(torch.device("cpu"))
    assert (vae.dtype, pipeline.vae.dtype) == (torch.float32, torch.float16)
    assert backbone.decode_latents(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_twins_run_from_prompt_to_picture(name):
    twin = build_twin(registry().backbone(name))
    side = twin.native_resolution // twin.latent_factor
    noise = torch.randn(2, twin.latent_channels, side, side)
    z0 = twin.denoise(noise, twin.sigmas(3, (side, side))[0], twin.encode_prompts(["a cat", "a dog"])).z0
    images = twin.decode_latents(z0)
    assert images.shape == (2, 3, twin.native_resolution, twin.native_resolution)
    assert twin.encode_images(images.clamp(0, 1)).shape == noise.shape


def test_one_condition_serves_a_whole_batch(backbones):
    x, condition = families.unet_input(backbones["xl"])
    one = condition.index([0])
    ours = backbones["xl"].denoise(x.latents, x.sigma, one).eps
    torch.testing.assert_close(ours, backbones["xl"].denoise(x.latents, x.sigma, one.expand(3)).eps)
    with pytest.raises(SliceError, match="does not fit a batch of 3"):
        backbones["xl"].stem(NoisyLatent(x.latents, x.sigma), condition.index([0, 1]))
