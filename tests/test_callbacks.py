"""Callbacks in unmodified pipeline calls: guidance by its formula, resampling by its weights, all families."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor

from pipeline_calls import (
    EACH,
    HEIGHT_WIDTH,
    SAME,
    SIZE,
    STEPS,
    WEIGHTS,
    Recorder,
    as_grid,
    by_hand,
    gradient,
    levels,
    linear_value,
    noise,
    open_all,
    resampling,
    run,
    with_scheduler,
)
from stitchvm.core import (
    ConfigError,
    GuidanceCallback,
    NonFiniteError,
    ResamplingCallback,
    SliceError,
    StitchedValue,
    backbone_from,
)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return open_all(tmp_path_factory)


# -- how the latents look


@EACH
def test_the_pipelines_latents_there_and_back(pipelines, kind):
    pipe = pipelines[kind]
    run(pipe, kind)
    backbone, held = backbone_from(pipe), noise(kind, 2)
    own = backbone.from_pipeline_latents(pipe, held, 0.6, SIZE)
    assert own.shape == (2, 4, 8, 12)
    torch.testing.assert_close(backbone.to_pipeline_latents(pipe, own, 0.6), held, rtol=0, atol=1e-6)
    expected = 0.8 * held if kind == "xl" else as_grid(kind, held)  # alpha is 0.8 at 0.6; Euler holds z / alpha
    torch.testing.assert_close(own, expected)


def test_a_call_is_read_the_same_whatever_the_scale_of_its_scheduler(pipelines):
    """Euler's steps in the scale ``z0 + s eps`` are DDIM's in the scale ``alpha z0 + sigma eps``: same levels, same
    latents."""
    found = {}
    for cls, settings in SAME:
        pipe, seen = with_scheduler(pipelines["xl"], cls, **settings), Recorder()
        run(pipe, "xl", seen)
        backbone = backbone_from(pipe)
        sigmas = backbone.pipeline_sigmas(pipe)
        read = [backbone.from_pipeline_latents(pipe, z, float(s)) for z, s in zip(seen.before, sigmas[1:], strict=True)]
        found[cls] = (sigmas, torch.stack(read))
    (sigmas, held), (euler_sigmas, euler_held) = found.values()
    torch.testing.assert_close(sigmas, euler_sigmas, rtol=0, atol=1e-5)
    torch.testing.assert_close(held, euler_held, rtol=1e-3, atol=2e-3)
    assert (seen.before[0] - held[0]).abs().max() > 0.1, "Euler's own latents are in another scale"


# -- guidance


@EACH
def test_no_strength_changes_nothing(pipelines, kind):
    pipe = pipelines[kind]
    guided = GuidanceCallback(linear_value(pipe), "a cat", strength=0.0, window=(0.0, 1.0), **HEIGHT_WIDTH)
    assert torch.equal(run(pipe, kind, guided), run(pipe, kind))
    assert len(guided.history) >= STEPS - 1


@pytest.mark.parametrize("kind", ["sd3", "flux", "sd"])
def test_guidance_is_the_formula(pipelines, kind):
    """Latents move by ``strength (alpha' sigma^2 / alpha - sigma sigma') grad V``, but not in the first step from pure
    noise or in the last."""
    pipe = with_scheduler(pipelines["sd"], DDIMScheduler, clip_sample=False) if kind == "sd" else pipelines[kind]
    guided = GuidanceCallback(linear_value(pipe), "a cat", strength=40.0, window=(0.0, 1.0), **HEIGHT_WIDTH)
    seen = Recorder(guided)
    run(pipe, kind, seen)
    sigmas = levels(pipe, kind)
    moved = []
    for step, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
        sigma, lower = sigmas[step], sigmas[step + 1]
        if kind == "sd":
            alpha, alpha_lower = (1 - sigma**2) ** 0.5, (1 - lower**2) ** 0.5
        else:
            alpha, alpha_lower = 1 - sigma, 1 - lower
        factor = 0.0 if alpha == 0 or lower == 0 else 40 * (alpha_lower * sigma**2 / alpha - sigma * lower)
        shift = as_grid(kind, after) - as_grid(kind, before)
        torch.testing.assert_close(shift, factor * gradient(), rtol=1e-4, atol=2e-6)
        moved.append(factor != 0)
    assert moved == [kind == "sd", *[True] * (STEPS - 2), False]
    assert [look.step for look in guided.history] == list(range(1, STEPS))
    for look, before in zip(guided.history, seen.before, strict=False):
        torch.testing.assert_close(torch.tensor(look.sigma), torch.tensor(sigmas[look.step]), rtol=0, atol=1e-6)
        torch.testing.assert_close(look.values, by_hand(as_grid(kind, before)), rtol=1e-4, atol=1e-5)


def test_guidance_is_the_same_in_every_scale(pipelines):
    """What it adds to Euler's latents is what it adds to DDIM's, and both end at the same image."""
    ends, plain = [], []
    for cls, settings in SAME:
        pipe = with_scheduler(pipelines["xl"], cls, **settings)
        guided = GuidanceCallback(linear_value(pipe), "a cat", strength=40.0, window=(0.0, 1.0), **HEIGHT_WIDTH)
        ends.append(run(pipe, "xl", guided))
        plain.append(run(pipe, "xl"))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=5e-3)
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=5e-3)
    assert (ends[0] - plain[0]).abs().max() > 0.2


def test_a_step_taken_again_is_guided_from_where_it_began(pipelines):
    """PNDM takes its first step twice: the second time it goes back to where the first began."""
    pipe = with_scheduler(pipelines["sd"], PNDMScheduler)
    guided = GuidanceCallback(linear_value(pipe), "a cat", strength=40.0, window=(0.0, 1.0), **HEIGHT_WIDTH)
    seen = Recorder(guided)
    run(pipe, "sd", seen)
    sigmas = levels(pipe, "sd")
    assert sigmas[1] == sigmas[2]
    first, again = (seen.after[step] - seen.before[step] for step in (0, 1))
    torch.testing.assert_close(first, again, rtol=1e-4, atol=1e-6)
    assert again.abs().max() > 1e-3


def test_unit_rms_forgets_the_values_scale(pipelines):
    pipe, strength = pipelines["sd3"], 0.1
    shifts = []
    for scale in (1.0, 1000.0):
        value = linear_value(pipe, tuple(scale * weight for weight in WEIGHTS))
        guided = GuidanceCallback(value, "a cat", strength=strength, normalisation="unit-rms", window=(0.4, 0.4))
        seen = Recorder(guided)
        run(pipe, "sd3", seen)
        shifts.append(seen.after[1] - seen.before[1])
    torch.testing.assert_close(*shifts, rtol=1e-3, atol=1e-6)
    sigma, lower = levels(pipe, "sd3")[1:3]
    expected = strength * sigma * (sigma - lower) / (1 - sigma)
    torch.testing.assert_close(shifts[0].square().mean().sqrt(), torch.tensor(expected), rtol=1e-3, atol=0)


def test_the_window_is_of_the_steps(pipelines):
    guided = GuidanceCallback(linear_value(pipelines["sd3"]), "a cat", window=(0.3, 0.7))
    run(pipelines["sd3"], "sd3", guided, num_inference_steps=10)
    assert [look.step for look in guided.history] == [3, 4, 5, 6, 7]
    run(pipelines["sd3"], "sd3", guided)
    assert [look.step for look in guided.history] == [2, 3], "the history is of the last call"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_precision_and_gradients_stay_the_pipelines(pipelines, mode):
    """Half precision goes in and comes out, and nothing keeps a graph, also where autograd is off for good."""
    pipe = pipelines["sd3"]
    guided = GuidanceCallback(linear_value(pipe), "a cat", strength=1.0, window=(0.0, 1.0))
    with mode():
        run(pipe, "sd3")
        held = noise("sd3", dtype=torch.bfloat16)
        found = guided(pipe, 2, pipe.scheduler.timesteps[2], {"latents": held, "prompt_embeds": held})
    assert found["latents"].dtype == torch.bfloat16
    assert not found["latents"].requires_grad
    assert found["prompt_embeds"] is held
    assert not guided.history[0].values.requires_grad
    assert not torch.equal(found["latents"], held)


@pytest.mark.parametrize(("batch", "expected"), [(64, [[2.0, 2.0, 4.0, 4.0]]), (3, [[2.0, 2.0, 4.0], [4.0]])])
def test_every_prompt_has_its_own_condition(pipelines, monkeypatch, batch, expected):
    """Rows of one prompt follow each other: two prompts with two images each."""
    pipe, value, given = pipelines["sd3"], linear_value(pipelines["sd3"]), []
    reward = value.reward()
    reward.condition_kind = "prompts"
    monkeypatch.setattr(reward, "encode_prompts", lambda prompts: _lengths(prompts))
    monkeypatch.setattr(
        type(value), "forward", lambda self, z, sigma, condition, prompt=None: _noted(given, z, condition)
    )
    run(pipe, "sd3", GuidanceCallback(value, ["ab", "abcd"], window=(0.4, 0.4), batch=batch), ["ab", "abcd"], 4,
        num_images_per_prompt=2)  # fmt: skip
    assert given == expected


def _lengths(prompts: list[str]) -> Any:
    from stitchvm.core import Condition

    return Condition({"text": torch.tensor([float(len(prompt)) for prompt in prompts])})


def _noted(given: list[list[float]], z: Tensor, condition: Any) -> Tensor:
    given.append(condition["text"].tolist())
    return z.sum((1, 2, 3))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_bound_on_the_batch_changes_nothing_else(pipelines, batch, monkeypatch):
    """Three prompts with two images each, of which passes of three take one and a half."""
    pipe, sizes, forward = pipelines["sd3"], [], StitchedValue.forward
    prompts, asked = ["a", "b", "c"], {"batch": 6, "num_images_per_prompt": 2}
    monkeypatch.setattr(
        StitchedValue,
        "forward",
        lambda self, z, *given, **more: sizes.append(len(z)) or forward(self, z, *given, **more),
    )
    ends, seen = [], []
    for bound in ({}, {"batch": batch}):
        settings = {"strength": 40.0, "window": (0.4, 0.8), **HEIGHT_WIDTH, **bound}
        for callback in (
            GuidanceCallback(linear_value(pipe), prompts, **settings),
            ResamplingCallback(linear_value(pipe), prompts, interval=1, **settings),
        ):
            sizes.clear()
            ends.append(run(pipe, "sd3", callback, prompts, **asked))
            assert max(sizes) == min(bound.get("batch", 64), 6)
            assert sum(sizes) == 6 * len(callback.history)
            seen.append(torch.stack([look.values.flatten() for look in callback.history]))
    for k in (0, 1):
        torch.testing.assert_close(ends[k], ends[k + 2], rtol=0, atol=1e-5)
        torch.testing.assert_close(seen[k], seen[k + 2], rtol=0, atol=1e-5)
    assert (ends[0] - ends[1]).abs().max() > 0.1


def test_a_value_that_reads_the_prompt_is_given_it(pipelines, monkeypatch):
    """By the pipeline's own text encoders, one sample a latent."""
    pipe, value, seen = pipelines["sd3"], linear_value(pipelines["sd3"]), []
    value.prompted = True
    features = StitchedValue.features
    monkeypatch.setattr(
        StitchedValue, "features", lambda self, z, sigma, prompt=None: seen.append(prompt) or features(self, z, sigma)
    )
    run(pipe, "sd3", GuidanceCallback(value, "ab", window=(0.4, 0.4)), "ab", 2, num_images_per_prompt=2)
    expected = backbone_from(pipe).encode_prompts(["ab", "ab"])
    assert set(seen[0].tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(seen[0][name], tensor)


# -- mistakes


def reading(pipe: Any, **settings: Any) -> GuidanceCallback:
    return GuidanceCallback(linear_value(pipe), "a cat", window=(0.0, 1.0), **settings)


def test_calls_that_do_not_fit(pipelines):
    sd3, flux = pipelines["sd3"], pipelines["flux"]
    with pytest.raises(ConfigError, match=r"call the pipeline with callback_on_step_end_tensor_inputs=\['latents'\]"):
        reading(sd3)(sd3, 0, torch.tensor(1000.0), {})
    with pytest.raises(ConfigError, match="3 latents cannot belong to 2 prompts in equal parts"):
        run(sd3, "sd3", GuidanceCallback(linear_value(sd3), ["a", "b"]), "a", 3, num_images_per_prompt=3)
    with pytest.raises(ConfigError, match="there are 2 latents a prompt, but particles is 3"):
        run(sd3, "sd3", resampling(sd3, particles=3), batch=2, num_images_per_prompt=2)
    with pytest.raises(ConfigError, match="latents of 256 x 256 pixels are 4096 tokens of 16 channels, but .* height"):
        run(flux, "flux", reading(flux))
    with pytest.raises(ConfigError, match="a PNDMScheduler; .* FlowMatchEulerDiscreteScheduler"):
        run(pipelines["sd"], "sd", reading(sd3))
    with pytest.raises(ConfigError, match="a FlowMatchEulerDiscreteScheduler are not at a known noise level"):
        run(sd3, "sd3", reading(pipelines["sd"]))
    with pytest.raises(
        ConfigError, match="cannot read this FluxPipeline's latents: the autoencoder of MMDiTBackbone scales"
    ):
        run(flux, "flux", reading(sd3))
    run(sd3, "sd3")
    with pytest.raises(SliceError, match=r"reads latents \[batch, 4, height, width\], got \[1, 3, 8, 8\]"):
        reading(sd3)(sd3, 1, sd3.scheduler.timesteps[1], {"latents": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ConfigError, match="step 1 is at timestep 3, which is not what the scheduler has there"):
        reading(sd3)(sd3, 1, torch.tensor(3.0), {"latents": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (diffusers.LMSDiscreteScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": False}),
    ],
)
def test_schedulers_that_are_refused(pipelines, scheduler, settings):
    pipe = with_scheduler(pipelines["sd"], scheduler, **settings)
    with pytest.raises(ConfigError, match=f"{scheduler.__name__}.* not at a known noise level .* use DDIMScheduler"):
        run(pipe, "sd", reading(pipelines["sd"]), num_inference_steps=12)


def test_a_value_that_is_not_finite(pipelines):
    pipe = pipelines["sd3"]
    with pytest.raises(NonFiniteError, match="no image of prompt 'a cat' has a value with a finite gradient at sigma"):
        run(pipe, "sd3", GuidanceCallback(linear_value(pipe, (float("nan"), 0.0, 0.0)), "a cat"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value": "folder"}, "value is a str; a callback takes a StitchedValue"),
        ({"prompt": []}, "prompt is \\[\\]; give the prompt"),
        ({"window": (0.8, 0.2)}, "window is 0.8 to 0.2"),
        ({"window": (0.2, 1.5)}, "1.5"),
        ({"resampler": "best"}, "resampler is 'best'; choose one of .*systematic"),
        ({"ess_threshold": 1.5}, "ess_threshold is 1.5; give a finite number from 0 to 1"),
        ({"batch": 0}, "batch is 0; give a whole number from 1 on"),
        ({"interval": 0}, "interval is 0; give a whole number from 1 on"),
        ({"interval": 1.5}, "interval is 1.5; give a whole number"),
        ({"strength": "2"}, "strength is '2'; give a finite number from 0 on"),
        ({"strength": True}, "strength is True; give a finite number from 0 on"),
        ({"prompt": None}, "prompt is None; give the prompt"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 on"),
        ({"height": 64}, "give both height and width"),
    ],
)
def test_settings_out_of_range(pipelines, settings, message):
    given = {"value": linear_value(pipelines["sd3"]), "prompt": "a cat", **settings}
    with pytest.raises(ConfigError, match=message):
        ResamplingCallback(given.pop("value"), given.pop("prompt"), **given)
    with pytest.raises(ConfigError, match="normalisation is 'none'; choose one of raw, unit-rms"):
        reading(pipelines["sd3"], normalisation="none")
    with pytest.raises(ConfigError, match="strength is nan; give a finite number"):
        reading(pipelines["sd3"], strength=float("nan"))
