"""Latents that a callback's value cannot read: another autoencoder's, and those that it has no finite value for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from pipeline_calls import HEIGHT_WIDTH, Recorder, linear_value, noise, resampling, run, stitched
from pipelines import open_pipeline, write_pipeline
from stitchvm.core import ConfigError, GuidanceCallback, NonFiniteError, StitchedValue, backbone_from


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sd3")
    write_pipeline(found, "sd3")
    return found


@pytest.fixture
def pair(folder) -> tuple[Any, Any]:
    """Two pipelines of the same weights that share none of them."""
    return open_pipeline(folder, "sd3"), open_pipeline(folder, "sd3")


def guiding(pipe: Any) -> GuidanceCallback:
    return GuidanceCallback(linear_value(pipe), "a cat", strength=5.0, window=(0.4, 0.6), **HEIGHT_WIDTH)


# -- another autoencoder's


def rescaled(pipe: Any, **settings: float) -> Any:
    pipe.vae.register_to_config(**settings)
    return pipe


@pytest.mark.parametrize("make", [guiding, resampling])
@pytest.mark.parametrize("scale", [{"scaling_factor": 1.6}, {"shift_factor": 0.1}])
def test_another_autoencoders_are_refused_in_the_first_step(pair, make, scale):
    """Though they have the same shape and path; also where it is compiled, or offloaded."""
    own, other = pair
    callback, seen = make(own), Recorder()
    run(other, "sd3", callback, batch=2, num_images_per_prompt=2)
    seen.inner = callback
    rescaled(other, **scale)
    for change in (lambda: None, lambda: compiled(other), lambda: other.enable_model_cpu_offload(device="cpu")):
        change()
        seen.before.clear()
        with pytest.raises(ConfigError, match=r"StableDiffusion3Pipeline's latents: .* by 1.5305 \(shift 0.0609\)"):
            run(other, "sd3", seen, batch=2, num_images_per_prompt=2)
        assert len(seen.before) == 1


def compiled(pipe: Any) -> None:
    pipe.vae = torch.compile(pipe.vae)


def test_a_value_of_stable_diffusion_does_not_read_sdxl(tmp_path):
    """Which have as many channels and one path."""
    for kind in ("sd", "xl"):
        write_pipeline(tmp_path / kind, kind)
    pipe, other = (open_pipeline(tmp_path / kind, kind) for kind in ("sd", "xl"))
    rescaled(other, scaling_factor=0.13025)
    with pytest.raises(ConfigError, match="UNetBackbone scales its latents by 0.18215 .* pipeline's by 0.13025"):
        run(other, "xl", guiding(pipe))


@pytest.mark.parametrize("change", ["decoder", "tiny", "none"])
def test_a_decoder_of_ones_own_is_no_other_autoencoder(pair, change):
    """Finetuned, or a distilled one in its place (as previews use), or none at all."""
    own, other = pair
    if change == "decoder":
        for parameter in other.vae.decoder.parameters():
            parameter.mul_(1.5)
    else:
        other.vae = diffusers.AutoencoderTiny(latent_channels=4) if change == "tiny" else None
    guided = guiding(own)
    run(other, "sd3", guided)
    assert len(guided.history) == 2


def test_a_head_keeps_the_scale_without_its_autoencoder(pair):
    own, other = pair
    value = stitched(backbone_from(own), prompted=False)
    value.head.part.companions = None
    rescaled(other, scaling_factor=2.0)
    with pytest.raises(ConfigError, match="the pipeline's by 2 "):
        run(other, "sd3", GuidanceCallback(value, "a cat", window=(0.4, 0.6), **HEIGHT_WIDTH))


# -- values that are not finite


@pytest.mark.parametrize("normalisation", ["raw", "unit-rms"])
@pytest.mark.parametrize(("lost", "number"), [("value", torch.nan), ("value", torch.inf), ("gradient", torch.nan)])
def test_a_latent_without_a_finite_gradient_is_not_guided(pair, monkeypatch, lost, number, normalisation):
    """In the first of two guided steps, while the other latents move as if all had one; in the second it is."""
    pipe, calls, forward = pair[0], [], StitchedValue.forward

    def forgetful(self: StitchedValue, z: Tensor, *given: Any, **more: Any) -> Tensor:
        calls.append(len(z))
        if len(calls) > 1 or not losing:
            return forward(self, z, *given, **more)
        if lost == "gradient":
            factor = torch.ones(len(z), 1, 1, 1)
            z = z * 1
            z.register_hook(lambda gradient: gradient * factor.index_fill(0, torch.tensor([1]), number))
        values = forward(self, z, *given, **more)
        return values if lost == "gradient" else values + torch.zeros(len(z)).index_fill(0, torch.tensor([1]), number)

    monkeypatch.setattr(StitchedValue, "forward", forgetful)
    found = []
    for losing in (False, True):
        calls.clear()
        settings = {"strength": 5.0, "normalisation": normalisation, "window": (0.4, 0.6), **HEIGHT_WIDTH}
        seen = Recorder(GuidanceCallback(linear_value(pipe), ["a", "b"], **settings))
        expected = pytest.warns(
            RuntimeWarning, match="1 of 4 latents have no value .* at sigma 0.75.*; they are not guid"
        )
        with expected if losing else nullcontext():
            run(pipe, "sd3", seen, ["a", "b"], 4, num_images_per_prompt=2)
        found.append(seen)
        assert seen.inner.history[0].values.isnan().tolist() == [False, losing and lost == "value", False, False]
    (plain, broken), kept = found, [0, 2, 3]
    for step in (1, 2):
        torch.testing.assert_close(broken.after[step][kept], plain.after[step][kept], rtol=0, atol=1e-6)
        assert (plain.after[step] - plain.before[step]).flatten(1).abs().amax(1).min() > 1e-3
    assert torch.equal(broken.after[1][1], broken.before[1][1])
    assert (broken.after[2][1] - broken.before[2][1]).abs().max() > 1e-3


def test_latents_that_are_lost_are_said_to_be(pair):
    """With their image; the other one goes on."""
    pipe = pair[0]
    guided = GuidanceCallback(linear_value(pipe), "a", window=(0.4, 0.4), **HEIGHT_WIDTH)
    latents = noise("sd3", 2)
    latents[1, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"1 of 2 latents .* \(1 of the latents are not finite .* are lost\); they"):
        ends = run(pipe, "sd3", guided, "a", 2, num_images_per_prompt=2, latents=latents)
    assert ends[0].isfinite().all()
    assert guided.history[0].values.isnan().tolist() == [False, True]


def test_a_prompt_without_any_is_an_error_though_another_has_some(pair, monkeypatch):
    pipe, forward = pair[0], StitchedValue.forward
    lost = torch.tensor([0.0, 0.0, torch.nan, torch.nan])
    monkeypatch.setattr(StitchedValue, "forward", lambda self, *given, **more: forward(self, *given, **more) + lost)
    with pytest.raises(NonFiniteError, match="no image of prompt 'b' has a value with a finite gradient"):
        run(pipe, "sd3", GuidanceCallback(linear_value(pipe), ["a", "b"]), ["a", "b"], 4, num_images_per_prompt=2)
