"""Latents that a callback's value cannot read: another autoencoder's, and those that it has no finite value for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from pipeline_calls import HEIGHT_WIDTH, Recorder, linear_value, resampling, run, stitched
from pipelines import open_pipeline, write_pipeline
from stitchvm.core import ConfigError, GuidanceCallback, NonFiniteError, StitchedValue, backbone_from
from stitchvm.plugins.backbones.mmdit import MMDiTBackbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sd3")
    write_pipeline(found, "sd3")
    return found


@pytest.fixture
def pair(folder) -> tuple[Any, Any]:
    """Two pipelines of the same weights that share none of them."""
    return open_pipeline(folder, "sd3"), open_pipeline(folder, "sd3")


def guiding(pipe: Any, value: StitchedValue | None = None) -> GuidanceCallback:
    return GuidanceCallback(value or linear_value(pipe), "a cat", strength=5.0, window=(0.4, 0.6), **HEIGHT_WIDTH)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry a decoding by a backbone."""
    seen: list[int] = []
    decode = MMDiTBackbone.decode_latents
    monkeypatch.setattr(MMDiTBackbone, "decode_latents", lambda self, z: seen.append(len(z)) or decode(self, z))
    return seen


# -- another autoencoder's


def disturbed(pipe: Any) -> Any:
    for parameter in pipe.vae.decoder.conv_out.parameters():
        parameter.add_(0.5)
    return pipe


@pytest.mark.parametrize("make", [guiding, resampling])
def test_another_autoencoders_are_refused_in_the_first_step(pair, make):
    """Though they have the same shape and path. Refused once more where the same callback is given again."""
    own, other = pair
    run(other, "sd3", make(own), batch=2, num_images_per_prompt=2)
    callback, seen = make(own), Recorder()
    seen.inner = callback
    disturbed(other)
    for _ in range(2):
        seen.before.clear()
        with pytest.raises(ConfigError, match="cannot read the samples of .* decode one latent to different pictures"):
            run(other, "sd3", seen, batch=2, num_images_per_prompt=2)
        assert len(seen.before) == 1
    run(own, "sd3", make(own), batch=2, num_images_per_prompt=2)


def test_they_are_compared_once_a_pipeline(pair, decodings):
    own, other = pair
    callback = guiding(own, stitched(backbone_from(own), prompted=False))
    for pipe, expected in ((own, 0), (other, 2), (other, 2), (own, 2), (other, 4)):
        run(pipe, "sd3", callback)
        assert len(decodings) == expected, "a pipeline over the value's own tensors decodes nothing"


@pytest.mark.parametrize("kind", ["offloaded", "tiny", "none"])
def test_a_pipeline_without_a_full_autoencoder_at_hand_is_not_compared(pair, decodings, kind):
    """Offloaded, a distilled decoder in its place (as previews use), or none at all."""
    own, other = pair
    disturbed(other)
    if kind == "offloaded":
        other.enable_model_cpu_offload(device="cpu")
    else:
        other.vae = diffusers.AutoencoderTiny(latent_channels=4) if kind == "tiny" else None
    guided = guiding(own)
    run(other, "sd3", guided)
    assert decodings == []
    assert len(guided.history) == 2


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


def test_a_prompt_without_any_is_an_error_though_another_has_some(pair, monkeypatch):
    pipe, forward = pair[0], StitchedValue.forward
    lost = torch.tensor([0.0, 0.0, torch.nan, torch.nan])
    monkeypatch.setattr(StitchedValue, "forward", lambda self, *given, **more: forward(self, *given, **more) + lost)
    with pytest.raises(NonFiniteError, match="no image of prompt 'b' has a value with a finite gradient"):
        run(pipe, "sd3", GuidanceCallback(linear_value(pipe), ["a", "b"]), ["a", "b"], 4, num_images_per_prompt=2)
