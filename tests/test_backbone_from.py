"""``core.backbone_from``: a backbone around a pipeline that is loaded already, for every family and a stranger's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from pipelines import KINDS, open_pipeline, pipeline_record, write_pipeline
from stitchvm import core
from stitchvm.core import ConfigError, Denoiser, Head, PluginLoadError, WeightsError, backbone_from, sample

EACH = pytest.mark.parametrize("kind", KINDS)
LENGTH = {"sd3": {"max_sequence_length": 3}, "flux": {"max_sequence_length": 6}, "sd": {}, "xl": {}}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    opened = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        write_pipeline(folder, kind)
        opened[kind] = open_pipeline(folder, kind)
    return opened


def _with(pipeline: Any, **parts: Any) -> Any:
    """The pipeline with other parts; the one it was made from keeps its own."""
    other = copy.copy(pipeline)
    other.__dict__ = dict(pipeline.__dict__)
    for name, part in parts.items():
        setattr(other, name, part)
    return other


@EACH
def test_it_shares_every_tensor(pipelines, kind):
    pipeline, part = pipelines[kind], KINDS[kind].part
    backbone = backbone_from(pipeline)
    assert isinstance(backbone, KINDS[kind].family)
    assert backbone.net is getattr(pipeline, part)
    assert backbone.companions.vae(torch.device("cpu")) is pipeline.vae
    own = {tensor.data_ptr() for tensor in getattr(pipeline, part).parameters()}
    head = Head(backbone, 2)
    assert {tensor.data_ptr() for tensor in head.parameters()} < own
    before = head.part.net.state_dict()
    first = next(iter(before))
    kept = before[first].clone()
    getattr(pipeline, part).state_dict()[first].add_(1.0)
    assert torch.equal(before[first], kept + 1.0)
    before[first].copy_(kept)


@EACH
def test_it_leaves_the_pipeline_as_it_was(pipelines, kind, tmp_path):
    write_pipeline(tmp_path, kind)
    pipeline = KINDS[kind].pipeline.from_pretrained(tmp_path, **dict.fromkeys(KINDS[kind].absent))
    net = getattr(pipeline, KINDS[kind].part).train()
    scheduler = pipeline.scheduler
    before = repr((scheduler.config, scheduler.timesteps))
    backbone = backbone_from(pipeline)
    backbone.sigmas(3, (8, 8))
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert pipeline.scheduler is scheduler
    assert repr((scheduler.config, scheduler.timesteps)) == before


@EACH
def test_latents_and_prompts_are_the_pipelines_own(pipelines, kind):
    pipeline = pipelines[kind]
    backbone = backbone_from(pipeline, **LENGTH[kind])
    config, images = pipeline.vae.config, torch.rand(1, 3, 16, 24)
    shift = config.shift_factor or 0.0
    raw = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    latents = backbone.encode_images(images)
    torch.testing.assert_close(latents, (raw - shift) * config.scaling_factor)
    shown = pipeline.vae.decode(latents / config.scaling_factor + shift, return_dict=False)[0]
    torch.testing.assert_close(
        backbone.decode_latents(latents).clamp(0, 1), pipeline.image_processor.postprocess(shown, output_type="pt")
    )
    loaded = KINDS[kind].family.from_pretrained(pipeline_record(Path(pipeline.name_or_path), kind))
    for ours, theirs in (
        (backbone.encode_prompts(["ab", ""]), loaded.encode_prompts(["ab", ""])),
        (backbone.null_condition(), loaded.null_condition()),
    ):
        assert set(ours.tensors) == set(theirs.tensors)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.tensors)


@EACH
def test_predictions_and_samples_are_the_pipelines_own(pipelines, kind):
    pipeline = pipelines[kind]
    if kind == "sd":  # PNDM combines several predictions into a step; DDIM takes each as it is
        pipeline = _with(pipeline, scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False,
                                                                       set_alpha_to_one=True))  # fmt: skip
    backbone = backbone_from(pipeline, **LENGTH[kind])
    x, condition = KINDS[kind].inputs(backbone)
    output = backbone.resume(backbone.head(x, condition, 0), 0)
    assert torch.equal(output, KINDS[kind].upstream(backbone, x, condition, getattr(pipeline, KINDS[kind].part)))

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    given = pipeline._pack_latents(noise, 1, 4, 8, 8) if kind == "flux" else noise.clone()
    scale = 3.5 if kind == "flux" else 3.0
    theirs = pipeline("a red ball", height=16, width=16, num_inference_steps=3, guidance_scale=scale, latents=given,
                      output_type="latent", **LENGTH[kind]).images  # fmt: skip
    guided = 1.0 if kind == "flux" else scale
    denoiser = Denoiser(backbone, backbone.encode_prompts(["a red ball"]), backbone.null_condition(), guided)
    ours = sample(denoiser, noise, backbone.sigmas(3, (8, 8)))
    theirs = pipeline._unpack_latents(theirs, 16, 16, 2) if kind == "flux" else theirs
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@EACH
def test_by_name_it_is_that_model_or_an_error(pipelines, kind):
    record = pipeline_record(Path("anywhere"), kind)
    backbone = backbone_from(pipelines[kind], name=record)
    assert core.name_of(backbone) == f"tiny-{kind}"
    assert backbone.native_resolution == 16
    assert torch.equal(
        backbone.encode_prompts(["ab"])["embeds"],
        backbone_from(pipelines[kind], **LENGTH[kind]).encode_prompts(["ab"])["embeds"],
    )
    big = {"sd3": "sd3.5-medium", "flux": "flux-schnell", "sd": "sd1.5", "xl": "sdxl"}[kind]
    with pytest.raises(WeightsError, match=r"of another architecture than the registry's: .* expected"):
        backbone_from(pipelines[kind], name=big)


def test_the_wrong_things(pipelines):
    with pytest.raises(ConfigError, match="a Tensor is no pipeline known here. backbone_from takes: .*FluxPipeline"):
        backbone_from(torch.zeros(1))
    with pytest.raises(WeightsError, match="FluxPipeline is a FluxTransformer2DModel, expected a SD3Tr"):
        backbone_from(pipelines["flux"], name="sd3.5-medium")
    with pytest.raises(core.UnknownNameError, match="Did you mean 'flux-dev'"):
        backbone_from(pipelines["flux"], name="flux-def")
    with pytest.raises(ConfigError, match="unknown setting guidence for a FluxPipeline; choose max_sequence_length"):
        backbone_from(pipelines["flux"], guidence=3.0)
    with pytest.raises(ConfigError, match="unknown setting guidance; a pipeline with a UNet takes none"):
        backbone_from(pipelines["sd"], guidance=3.0)


@EACH
def test_parts_that_are_missing(pipelines, kind):
    with pytest.raises(WeightsError, match="vae of this .* is a NoneType, expected a AutoencoderKL"):
        backbone_from(_with(pipelines[kind], vae=None))
    with pytest.raises(WeightsError, match=f"{KINDS[kind].part} of this .* is a NoneType"):
        backbone_from(_with(pipelines[kind], **{KINDS[kind].part: None}))
    needed = "text_encoder" if len(KINDS[kind].encoders) == 1 else "text_encoder_2"
    backbone = backbone_from(_with(pipelines[kind], **{needed: None}))
    with pytest.raises(ConfigError, match=f"was loaded without its {needed}, which reads prompts"):
        backbone.encode_prompts(["a"])


@EACH
def test_an_offloaded_network_is_refused(pipelines, kind):
    net = copy.deepcopy(getattr(pipelines[kind], KINDS[kind].part))
    accelerate.hooks.add_hook_to_module(net, accelerate.hooks.ModelHook())
    with pytest.raises(WeightsError, match="is offloaded.*remove_all_hooks"):
        backbone_from(_with(pipelines[kind], **{KINDS[kind].part: net}))


@EACH
def test_a_compiled_network_is_cut_as_it_is(pipelines, kind):
    net = getattr(pipelines[kind], KINDS[kind].part)
    compiled = torch.compile(net, backend="eager")
    assert backbone_from(_with(pipelines[kind], **{KINDS[kind].part: compiled})).net is net


def test_guidance_and_length_are_settings(pipelines):
    backbone = backbone_from(pipelines["flux"], guidance=2.0, max_sequence_length=4)
    assert backbone.guidance == 2.0
    assert backbone.encode_prompts(["a"])["embeds"].shape[1] == 4
    assert backbone_from(pipelines["flux"]).guidance == 3.5


PLUGIN = """
from stitchvm.core import Family, hookimpl

class Wrapped:
    record = None

    @classmethod
    def from_pipeline(cls, pipeline, *, record=None, **options):
        made = cls()
        made.pipeline, made.options = pipeline, options
        return made

@hookimpl
def stitchvm_backbones():
    yield Family(kind="backbone", name="mine", load="acme_mine:Wrapped", spec_version=1,
                 pipelines=("MinePipeline", "AutoencoderKL"))
    yield Family(kind="backbone", name="rival", load="acme_mine:Wrapped", spec_version=1, pipelines=("AutoencoderKL",))
    yield Family(kind="backbone", name="foldersonly", load="acme_mine:Wrapped", spec_version=1)
    yield Family(kind="backbone", name="needy", load="acme_mine:Wrapped", spec_version=1, pipelines=("Needy",),
                 requires=("no_such_library",))
"""


def test_a_plugin_brings_its_own_pipelines(install, fresh_registry):
    """Core knows no class by itself: it asks what is installed, by the names of a pipeline's class and its bases."""
    install("acme", {"acme_mine": PLUGIN}, {"mine": "acme_mine"})
    derived = type("Derived", (type("MinePipeline", (), {}),), {})()
    assert backbone_from(derived, speed=2).options == {"speed": 2}
    vae = AutoencoderKL(block_out_channels=[4], norm_num_groups=2)
    with pytest.raises(ConfigError, match="taken by the families mine and rival; choose one"):
        backbone_from(vae)
    assert backbone_from(vae, family="rival").pipeline is vae
    with pytest.raises(ConfigError, match="'foldersonly' takes no loaded pipeline"):
        backbone_from(vae, family="foldersonly")
    with pytest.raises(PluginLoadError, match="needs no_such_library"):
        backbone_from(type("Needy", (), {})())
