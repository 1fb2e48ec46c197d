"""``core.steer``: what a pipeline returns, from samples that a value steered; against the unmodified pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler

from analytic import LinearReward
from pipelines import KINDS, open_pipeline, write_pipeline
from stitchvm import core
from stitchvm.core import LATENT, ConfigError, Head, StitchedValue, Tail, backbone_from, name_of, steer
from stitchvm.core.alignment.particles import initial_noise
from stitchvm.core.alignment.result import AlignResult
from stitchvm.core.branch import Branch
from stitchvm.core.layer import StitchingLayer

EACH = pytest.mark.parametrize("kind", KINDS)
OUTPUTS = {
    "sd3": "StableDiffusion3PipelineOutput", "flux": "FluxPipelineOutput", "sd": "StableDiffusionPipelineOutput",
    "xl": "StableDiffusionXLPipelineOutput",
}  # fmt: skip
DEFAULTS = {"sd3": (28, 7.0), "flux": (28, 3.5), "sd": (50, 7.5), "xl": (50, 5.0)}
"""Steps and guidance that the pipelines' documentation says they take."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    opened = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        write_pipeline(folder, kind)
        opened[kind] = open_pipeline(folder, kind)
    # PNDM makes a step of several predictions; DDIM takes each as it is, down to the clean latent
    opened["sd"].scheduler = DDIMScheduler.from_config(
        opened["sd"].scheduler.config, clip_sample=False, set_alpha_to_one=True
    )
    return opened


def brightness() -> LinearReward:
    return LinearReward((1.0, 0.5, 0.25), side=16)


def stitched(pipe: Any) -> StitchedValue:
    """A linear value of the latents themselves, ``mean over positions of z_0 - z_1``, for a reward of no prompt."""
    backbone, reward = backbone_from(pipe), LinearReward((1.0, -1.0, 0.0), side=8)
    layer = StitchingLayer(4, 6, 8)
    layer.load_map(torch.eye(6, 4), torch.zeros(6))
    branch = Branch(layer, Tail(reward, 1, torch.zeros(1, 6)))
    return StitchedValue(
        Head(backbone, LATENT), {name_of(reward): branch}, backbone.null_condition(), rewards={name_of(reward): reward}
    )


def own_call(pipe: Any, kind: str, noise: torch.Tensor, size: tuple[int, int], **settings: Any) -> Any:
    """The unmodified pipeline from this noise ``[B, 4, h, w]``."""
    given = pipe._pack_latents(noise, *noise.shape) if kind == "flux" else noise.clone()
    return pipe(height=size[0], width=size[1], latents=given, **settings, **KINDS[kind].call)


def with_length(pipe: Any, kind: str) -> core.Backbone:
    """Read at the T5 length that ``own_call`` is told."""
    return backbone_from(pipe, **KINDS[kind].call)


@EACH
@pytest.mark.parametrize("guidance", [None, 2.0, 0.5])
def test_the_plain_method_is_the_pipeline(pipelines, kind, guidance):
    """From the same noise, for two prompts and an image that is not square, at the pipeline's own guidance or
    another; below 1 there is none."""
    pipe, prompts, size = pipelines[kind], ["a red ball", "two cats"], (16, 24)
    noise = initial_noise(3, [0, 1], 1, (4, 8, 12))[:, 0]
    ask = {} if guidance is None else {"guidance_scale": guidance}
    settings = {"num_inference_steps": 3, "output_type": "pt", **ask}
    theirs = own_call(pipe, kind, noise, size, prompt=prompts, **settings)
    ours = steer(pipe, None, prompts, "sample", height=16, width=24, generator=3, reward=brightness(),
                 backbone=with_length(pipe, kind), **settings)  # fmt: skip
    assert type(ours) is type(theirs)
    assert type(ours).__name__ == OUTPUTS[kind]
    torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=2e-3)
    other = own_call(pipe, kind, noise, size, prompt=prompts, **{**settings, "guidance_scale": 9.0})
    assert (other.images - theirs.images).abs().max() > 1e-2, "or else guidance would not be compared"


@EACH
def test_steps_and_guidance_are_the_pipelines_own_by_default(pipelines, kind):
    pipe = pipelines[kind]
    noise = initial_noise(3, [0], 1, (4, 8, 8))[:, 0]
    theirs = own_call(pipe, kind, noise, (16, 16), prompt="a red ball", output_type="pt")
    taken = len(pipe.scheduler.timesteps)
    ours, result = steer(pipe, None, "a red ball", "sample", height=16, width=16, generator=3, reward=brightness(),
                         output_type="pt", return_particles=True, backbone=with_length(pipe, kind))  # fmt: skip
    torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=2e-3)
    steps, guidance = DEFAULTS[kind]
    assert result.settings["steps"] == taken == steps
    assert result.settings["guidance_scale"] == (1.0 if kind == "flux" else guidance)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "flux"])
def test_a_negative_prompt_is_the_pipelines(pipelines, kind):
    pipe, prompts, size = pipelines[kind], ["a red ball", "two cats"], (16, 16)
    noise = initial_noise(3, [0, 1], 1, (4, 8, 8))[:, 0]
    settings = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 6.0}
    theirs = own_call(pipe, kind, noise, size, prompt=prompts, negative_prompt=["blurred, grey"] * 2, **settings)
    ours, result = steer(
        pipe, None, prompts, "sample", negative_prompt="blurred, grey", generator=3, reward=brightness(),
        return_particles=True, backbone=with_length(pipe, kind), **settings,
    )  # fmt: skip
    torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=2e-3)
    without = own_call(pipe, kind, noise, size, prompt=prompts, **settings)
    assert (without.images - theirs.images).abs().max() > 1e-2, "or else the negative prompt would not be compared"
    assert result.settings["negative_prompt"] == "blurred, grey"


def test_a_head_under_the_empty_prompt_begins_no_pass_of_a_negative_one(pipelines):
    pipe, backbone, linear = pipelines["sd3"], backbone_from(pipelines["sd3"]), stitched(pipelines["sd3"])
    branch = Branch(StitchingLayer(backbone.feature_info()[1].num_chs, 6, 8), linear.branches[0].tail)
    value = StitchedValue(Head(backbone, 1), dict.fromkeys(linear.names, branch), linear.null,
                          rewards={name: linear.reward(name) for name in linear.names})  # fmt: skip
    ask = {"num_inference_steps": 3, "particles": 2, "resample_at": (1, 2), "unit": "step", "return_particles": True}
    for negative, resumed in ((None, 4), ("blurred", 0)):
        cost = steer(pipe, value, "a", negative_prompt=negative, **ask)[1].cost
        assert (cost.get("resumed", 0), cost["denoiser"] + cost.get("resumed", 0)) == (resumed, 12)


@EACH
def test_every_kind_of_output(pipelines, kind):
    pipe = pipelines[kind]
    noise = initial_noise(0, [0], 1, (4, 8, 8))[:, 0]
    found = {}
    for output in ("pil", "np", "pt", "latent"):
        settings = {"num_inference_steps": 2, "output_type": output}
        theirs = own_call(pipe, kind, noise, (16, 16), prompt="a cat", **settings)
        ours = steer(pipe, None, "a cat", "sample", height=16, width=16, reward=brightness(),
                     backbone=with_length(pipe, kind), **settings)  # fmt: skip
        assert type(ours.images) is type(theirs.images)
        found[output] = ours.images
        if output == "pil":
            assert isinstance(ours.images[0], PIL.Image.Image)
            assert np.abs(np.asarray(ours.images[0]).astype(int) - np.asarray(theirs.images[0])).max() <= 1
        else:
            same = (np.asarray(each.images) for each in (ours, theirs))
            np.testing.assert_allclose(*same, rtol=0, atol=2e-3)
    assert found["latent"].shape == ((1, 16, 16) if kind == "flux" else (1, 4, 8, 8))
    if kind == "sd":
        assert ours.nsfw_content_detected is None
    flat = steer(pipe, None, "a cat", "sample", height=16, width=16, reward=brightness(), num_inference_steps=2,
                 output_type="pt", return_dict=False, backbone=with_length(pipe, kind))  # fmt: skip
    assert torch.equal(flat[0], found["pt"])
    assert flat[1:] == ((None,) if kind == "sd" else ())


@pytest.mark.parametrize("value", ["stitched", "tweedie", "estimator"])
def test_the_best_particle_is_returned(pipelines, value):
    pipe, reward = pipelines["sd3"], brightness()
    given = {"stitched": stitched(pipe), "tweedie": "tweedie", "estimator": core.Tweedie(reward)}[value]
    output, result = steer(
        pipe, given, ["a", "b", "c"], num_inference_steps=4, particles=4, interval=1, ess_threshold=0.0,
        output_type="pt", return_particles=True, **({} if value == "stitched" else {"reward": reward}),
    )  # fmt: skip
    assert isinstance(result, AlignResult)
    assert result.particles.rewards.shape == (3, 4)
    assert result.particles.history[0].values.std() > 0
    assert result.particles.best.any(), "or else the first particle would do"
    images = backbone_from(pipe).decode_latents(result.particles.latents.flatten(0, 1)).unflatten(0, (3, 4))
    assert (images[:, 1:] - images[:, :1]).abs().amax((2, 3, 4)).min() > 0.05
    torch.testing.assert_close(output.images, result.images, rtol=0, atol=0.6 / 255)
    assert result.settings["guidance_scale"] == 7.0


def test_strength_raises_the_value(pipelines):
    """Over the same particles unsteered, paired by prompt, in what the value reads of the clean latents."""
    pipe = pipelines["sd3"]
    value = stitched(pipe)
    settings = {"num_inference_steps": 4, "particles": 8, "interval": 1, "window": (0.0, 1.0), "output_type": "latent",
                "guidance_scale": 1.0, "return_particles": True}  # fmt: skip
    prompts = ["a"] * 5
    tilted, plain = (
        steer(pipe, value, prompts, strength=strength, **settings)[1].particles.latents for strength in (40.0, 0.0)
    )
    gain = ((tilted - plain)[:, :, 0] - (tilted - plain)[:, :, 1]).mean((1, 2, 3))
    assert gain.mean() > 4 * gain.std() / len(prompts) ** 0.5


def test_a_saved_value_is_steered_by(pipelines, tmp_path, monkeypatch):
    pipe = pipelines["sd3"]
    value = stitched(pipe)
    monkeypatch.setattr(core.artefact, "load_reward", lambda *_, **__: value.reward())
    value.save_pretrained(tmp_path)
    settings = {"num_inference_steps": 3, "output_type": "latent", "particles": 2}
    saved, given = (steer(pipe, one, "a", **settings).images for one in (tmp_path, value))
    assert torch.equal(saved, given)


def test_a_generator_is_a_seed(pipelines):
    pipe, reward = pipelines["sd3"], brightness()

    def one(generator: Any) -> torch.Tensor:
        return steer(pipe, None, "a", "sample", reward=reward, num_inference_steps=1, generator=generator,
                     output_type="latent").images  # fmt: skip

    before = torch.random.get_rng_state()
    assert torch.equal(one(None), one(0))
    assert not torch.equal(one(1), one(0))
    first, second = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    assert torch.equal(one(first), one(second))
    assert not torch.equal(one(first), one(torch.Generator().manual_seed(7)))
    assert torch.equal(torch.random.get_rng_state(), before)


@EACH
def test_guidance_is_embedded_where_the_network_reads_it(pipelines, kind):
    backbone = backbone_from(pipelines[kind])
    network, scale = backbone.at_guidance(2.0)
    if kind == "flux":
        assert (network.guidance, scale, backbone.guidance) == (2.0, 1.0, 3.5)
        assert network.net is backbone.net
        assert not network.shares_blocks(backbone, 1), "a pass under one guidance is none under another"
        assert network.shares_blocks(backbone_from(pipelines[kind], guidance=2.0), 1)
    else:
        assert network is backbone
        assert (scale, backbone.at_guidance(0.0)[1]) == (2.0, 1.0)


def test_the_progress_bar_is_the_pipelines(pipelines, capsys):
    steer(pipelines["sd3"], None, "a", "sample", reward=brightness(), num_inference_steps=1)
    assert capsys.readouterr().err == "", "switched off in these pipelines"


class Mute:
    """A pipeline that does not say what it returns, and has no guidance."""

    def __call__(self, prompt: str):
        """Nothing."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; choose one of pil, pt, np, latent"),
        ({"seed": 3}, "steer takes generator in the place of seed"),
        ({"embedded_guidance": 3.0}, "steer takes guidance_scale in the place of embedded_guidance"),
        ({"num_images_per_prompt": 3}, "steer takes particles in the place of num_images_per_prompt"),
        ({"negative_prompt": ["x"]}, r"negative_prompt is \['x'\]; give one text for all prompts"),
        ({"negative_prompt": "x", "guidance_scale": 1.0}, "only classifier-free guidance reads it, and there is none"),
        ({"generator": [1, 2]}, "generator is a list; give one torch.Generator, or a seed"),
        ({"height": 17}, r"resolution is 17 x 16 pixels; \S+ needs multiples of 2"),
        ({"reward": None}, "no reward to choose the best sample by"),
    ],
)
def test_mistakes(pipelines, settings, message):
    with pytest.raises(ConfigError, match=message):
        steer(pipelines["sd3"], None, "a", "sample", **{"reward": brightness(), "num_inference_steps": 1, **settings})


def test_embedded_guidance_has_no_negative_prompt(pipelines):
    with pytest.raises(ConfigError, match="only classifier-free guidance reads it"):
        steer(pipelines["flux"], None, "a", "sample", reward=brightness(), negative_prompt="x", guidance_scale=3.5)


def test_what_is_no_pipeline():
    with pytest.raises(ConfigError, match="Mute does not say what its call returns; pass return_dict=False"):
        steer(Mute(), None, "a")
    with pytest.raises(ConfigError, match="the call of a Mute has no guidance_scale by default; pass guidance_scale="):
        steer(Mute(), None, "a", return_dict=False)
    with pytest.raises(ConfigError, match="Mute has no num_inference_steps by default; pass num_inference_steps="):
        steer(Mute(), None, "a", return_dict=False, guidance_scale=1.0)
    with pytest.raises(ConfigError, match="a Mute is no pipeline known here"):
        steer(Mute(), None, "a", return_dict=False, guidance_scale=1.0, num_inference_steps=2)


def test_the_guide_runs(pipelines, monkeypatch, tmp_path):
    """Every block of docs/steering.md in turn, with a small pipeline and value in the place of the named ones."""
    pipe = pipelines["sd3"]
    guide = (Path(__file__).parent.parent / "docs" / "steering.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(pipe), "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(StitchedValue, "from_pretrained", lambda *_, **__: stitched(pipe))
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/steering.md", "exec"), names)
    assert names["output"].images[0].size == (16, 16)
    assert len(names["guided"].images) == 1
    assert names["guidance"].history
    assert (tmp_path / "fox.png").is_file()
