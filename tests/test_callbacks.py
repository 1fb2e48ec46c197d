"""Callbacks in unmodified pipeline calls: guidance by its formula, resampling by its weights, all families."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor
from torch.nn import functional as F

from analytic import LinearReward
from pipelines import KINDS, open_pipeline, write_pipeline
from stitchvm.core import (
    LATENT,
    ConfigError,
    GuidanceCallback,
    Head,
    NonFiniteError,
    ResamplingCallback,
    SliceError,
    StitchedValue,
    Tail,
    backbone_from,
    name_of,
)
from stitchvm.core.layer import StitchingLayer
from stitchvm.core.value import Branch

EACH = pytest.mark.parametrize("kind", KINDS)
WEIGHTS = (1.0, -2.0, 0.5)
STEPS, SIZE = 5, (16, 24)
HEIGHT_WIDTH = {"height": SIZE[0], "width": SIZE[1]}
SAME = ((DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}), (EulerDiscreteScheduler, {}))
"""Two schedulers that take the same steps in two scales."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    opened = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        write_pipeline(folder, kind)
        opened[kind] = open_pipeline(folder, kind)
    return opened


def with_scheduler(pipe: Any, cls: Any, **settings: Any) -> Any:
    other = copy.copy(pipe)
    other.__dict__ = {**pipe.__dict__}
    other.scheduler = cls.from_config(pipe.scheduler.config, **settings)
    return other


def linear_value(pipe: Any, weights: tuple[float, ...] = WEIGHTS) -> StitchedValue:
    """The value that :func:`by_hand` writes out."""
    backbone, reward = backbone_from(pipe), LinearReward(weights, side=8)
    layer = StitchingLayer(4, 6, 8)
    layer.load_map(torch.eye(6, 4), torch.zeros(6))
    branch = Branch(layer, Tail(reward, 1, torch.zeros(1, 6)))
    name = name_of(reward)
    return StitchedValue(Head(backbone, LATENT), {name: branch}, backbone.null_condition(), rewards={name: reward})


def by_hand(latents: Tensor) -> Tensor:
    """``mean over 8 x 8 resampled positions of WEIGHTS . z``, of the first three channels ``[B, 4, h, w]``."""
    small = F.interpolate(latents[:, :3], size=(8, 8), mode="bilinear", antialias=True)
    return (torch.tensor(WEIGHTS)[:, None, None] * small).sum(1).mean((1, 2))


def gradient() -> Tensor:
    """Of :func:`by_hand`, the same everywhere: ``[1, 4, 8, 12]``."""
    latents = torch.zeros(1, 4, 8, 12, requires_grad=True)
    (found,) = torch.autograd.grad(by_hand(latents).sum(), latents)
    return found


def noise(kind: str, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(5)).to(dtype)
    return diffusers.FluxPipeline._pack_latents(drawn, *drawn.shape) if kind == "flux" else drawn


class Recorder:
    """Notes the latents after every step, before and after another callback acts."""

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.before, self.after = inner, [], []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.before.append(tensors["latents"].clone())
        if self.inner is not None:
            tensors = self.inner(pipe, step, timestep, tensors)
        self.after.append(tensors["latents"].clone())
        return tensors


def run(pipe: Any, kind: str, callback: Any = None, prompt: Any = "a cat", batch: int = 1, **settings: Any) -> Tensor:
    """The clean latents of the pipeline's own call."""
    hook = {} if callback is None else {
        "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]
    }  # fmt: skip
    asked = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": noise(kind, batch), **settings}
    return pipe(prompt, output_type="latent", **HEIGHT_WIDTH, **asked, **hook, **KINDS[kind].call).images


def levels(pipe: Any, kind: str) -> list[float]:
    """The noise levels of the last call, from the scheduler's own numbers."""
    scheduler = pipe.scheduler
    if kind in ("sd3", "flux"):
        return [float(sigma) for sigma in scheduler.sigmas]
    visited = [(1 - float(scheduler.alphas_cumprod[int(t)])) ** 0.5 for t in scheduler.timesteps]
    return [*visited, 0.0]


def as_grid(kind: str, latents: Tensor) -> Tensor:
    return diffusers.FluxPipeline._unpack_latents(latents, *SIZE, 2) if kind == "flux" else latents


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
    pipe = with_scheduler(pipelines["sd"], DDIMScheduler) if kind == "sd" else pipelines[kind]
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


def test_every_prompt_has_its_own_condition(pipelines, monkeypatch):
    """Rows of one prompt follow each other: two prompts with two images each."""
    pipe, value, given = pipelines["sd3"], linear_value(pipelines["sd3"]), []
    reward = value.reward()
    reward.condition_kind = "prompts"
    monkeypatch.setattr(reward, "encode_prompts", lambda prompts: _lengths(prompts))
    monkeypatch.setattr(
        type(value), "forward", lambda self, z, sigma, condition, prompt=None: _noted(given, z, condition)
    )
    run(pipe, "sd3", GuidanceCallback(value, ["ab", "abcd"], window=(0.4, 0.4)), ["ab", "abcd"], 4,
        num_images_per_prompt=2)  # fmt: skip
    assert given == [[2.0, 2.0, 4.0, 4.0]]


def _lengths(prompts: list[str]) -> Any:
    from stitchvm.core import Condition

    return Condition({"text": torch.tensor([float(len(prompt)) for prompt in prompts])})


def _noted(given: list[list[float]], z: Tensor, condition: Any) -> Tensor:
    given.append(condition["text"].tolist())
    return z.sum((1, 2, 3))


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


# -- resampling


def resampling(pipe: Any, **settings: Any) -> ResamplingCallback:
    settings = {"window": (0.4, 0.8), "interval": 2, **settings}
    return ResamplingCallback(linear_value(pipe), "a cat", **HEIGHT_WIDTH, **settings)


@EACH
def test_equal_values_change_nothing(pipelines, kind):
    pipe = pipelines[kind]
    value = linear_value(pipe, (0.0, 0.0, 0.0))
    callback = ResamplingCallback(value, "a cat", window=(0.0, 1.0), interval=1, particles=3, **HEIGHT_WIDTH)
    settings = {"batch": 3, "num_images_per_prompt": 3}
    assert torch.equal(run(pipe, kind, callback, **settings), run(pipe, kind, **settings))
    assert all(look.ess.tolist() == [3.0] and not look.resampled.any() for look in callback.history)
    systematic = ResamplingCallback(value, "a cat", resampler="systematic", ess_threshold=1.0, **HEIGHT_WIDTH)
    assert torch.equal(run(pipe, kind, systematic, **settings), run(pipe, kind, **settings))
    assert all(look.resampled.all() for look in systematic.history)


@EACH
def test_the_dominating_particle_is_copied(pipelines, kind):
    """At so high a strength the best latent of each prompt replaces the other two, and only those of its prompt."""
    pipe = pipelines[kind]
    callback = ResamplingCallback(
        linear_value(pipe), ["a cat", "a dog"], strength=1e6, window=(0.4, 0.6), interval=2, **HEIGHT_WIDTH
    )
    seen = Recorder(callback)
    end = run(pipe, kind, seen, ["a cat", "a dog"], 6, num_images_per_prompt=3)
    (look,) = callback.history
    step = look.step - 1
    best = look.values.argmax(1)
    for prompt in range(2):
        rows = slice(3 * prompt, 3 * prompt + 3)
        chosen = seen.before[step][3 * prompt + best[prompt]]
        assert torch.equal(seen.after[step][rows], chosen.expand_as(seen.after[step][rows]))
        torch.testing.assert_close(end[rows], end[rows][:1].expand_as(end[rows]), rtol=0, atol=1e-4)
        assert look.ancestors[prompt].tolist() == [int(best[prompt])] * 3
    assert not torch.equal(end[0], end[3])


def test_weights_are_those_of_value_differences(pipelines):
    """Carried while the effective sample size is large: ``strength V`` at the last look, by telescoping."""
    pipe = pipelines["sd3"]
    callback = resampling(pipe, strength=2.0, ess_threshold=0.0, window=(0.0, 1.0), interval=1)
    run(pipe, "sd3", callback, batch=3, num_images_per_prompt=3)
    looks = callback.history
    assert len(looks) == STEPS - 1
    for look in looks:
        weights = (2.0 * look.values.double()).softmax(1)
        torch.testing.assert_close(look.ess.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(callback.log_weights, 2.0 * looks[-1].values.double(), rtol=1e-5, atol=1e-6)


def test_weights_start_anew_after_resampling(pipelines):
    """The next weights are ``strength (V_2 - V_1)`` of the survivors and what descends from them."""
    pipe = with_scheduler(pipelines["sd3"], diffusers.FlowMatchEulerDiscreteScheduler, stochastic_sampling=True)
    callback = resampling(pipe, strength=30.0, ess_threshold=1.0, window=(0.4, 0.8), interval=1)
    callback.ess_threshold = 1.0
    torch.manual_seed(0)
    run(pipe, "sd3", callback, batch=4, num_images_per_prompt=4)
    first, second = callback.history[:2]
    kept = first.values.gather(1, first.ancestors)
    weights = (30.0 * (second.values - kept).double()).softmax(1)
    assert len(set(second.values[0].tolist())) == 4, "the scheduler's noise parts copies"
    torch.testing.assert_close(second.ess.double(), 1 / weights.square().sum(1), rtol=1e-3, atol=0)


def test_draws_are_the_seeds(pipelines):
    pipe = pipelines["sd3"]
    value, ancestors = linear_value(pipe), []
    before = torch.random.get_rng_state()
    for seed in (1, 1, *range(2, 8)):
        callback = ResamplingCallback(value, "a cat", strength=1.0, ess_threshold=1.0, seed=seed, **HEIGHT_WIDTH)
        for _ in range(2):
            run(pipe, "sd3", callback, batch=4, num_images_per_prompt=4)
            ancestors.append(callback.history[0].ancestors.tolist())
    assert ancestors[0] == ancestors[1] == ancestors[2] == ancestors[3]
    assert len({str(drawn) for drawn in ancestors}) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DPMSolverMultistepScheduler])
def test_what_a_scheduler_remembers_follows(pipelines, scheduler, monkeypatch):
    """A call whose particles are exchanged at a step goes on as one that had begun with them so."""
    pipe = with_scheduler(pipelines["sd"], scheduler)
    start, swapped = noise("sd", 3), [2, 2, 0]
    callback = resampling(pipe, ess_threshold=1.0, window=(0.5, 0.6), particles=3)
    monkeypatch.setattr(ResamplingCallback, "_resample", lambda *_: torch.tensor([swapped]))
    exchanged = run(pipe, "sd", callback, num_images_per_prompt=3, latents=start)
    begun = run(pipe, "sd", num_images_per_prompt=3, latents=start[swapped])
    torch.testing.assert_close(exchanged, begun, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(begun[0], begun[2], atol=1e-2)


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
    with pytest.raises(SliceError, match=r"reads latents \[batch, 4, height, width\], got \[1, 24, 16\]"):
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
    for value, message in (((float("nan"), 0.0, 0.0), "the value is not finite at sigma"),):
        with pytest.raises(NonFiniteError, match=message):
            run(pipe, "sd3", GuidanceCallback(linear_value(pipe, value), "a cat"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value": "folder"}, "value is a str; a callback takes a StitchedValue"),
        ({"prompt": []}, "prompt is \\[\\]; give the prompt"),
        ({"window": (0.8, 0.2)}, "window is 0.8 to 0.2"),
        ({"window": (0.2, 1.5)}, "1.5"),
        ({"resampler": "best"}, "resampler is 'best'; choose one of .*systematic"),
        ({"ess_threshold": 1.5}, "ess_threshold is 1.5; it must be at least 0 and at most 1"),
        ({"interval": 0}, "interval is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"height": 64}, "give both height and width"),
    ],
)
def test_settings_out_of_range(pipelines, settings, message):
    given = {"value": linear_value(pipelines["sd3"]), "prompt": "a cat", **settings}
    with pytest.raises(ConfigError, match=message):
        ResamplingCallback(given.pop("value"), given.pop("prompt"), **given)
    with pytest.raises(ConfigError, match="normalisation is 'none'; choose one of raw, unit-rms"):
        reading(pipelines["sd3"], normalisation="none")
