"""Guidance by the schedulers' own ``step``, taken again with the network's outputs shifted and not."""

from __future__ import annotations

import copy
import functools
from typing import Any

import attrs
import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from pipeline_calls import (
    HEIGHT_WIDTH,
    STEPS,
    Recorder,
    gradient,
    levels,
    linear_value,
    open_all,
    resampling,
    run,
    with_scheduler,
)
from stitchvm.core import ConfigError, GuidanceCallback
from stitchvm.plugins.backbones.discrete_time import DiscreteTime, pipeline_levels

STRENGTH = 100.0


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return open_all(tmp_path_factory)


@attrs.define
class Watched:
    """A scheduler's steps as a pipeline took them: what each was given, and the scheduler as it was before the
    first."""

    before: Any = None
    taken: list[tuple[tuple[Tensor, Any, Tensor], dict[str, Any]]] = attrs.field(factory=list)

    @classmethod
    def over(cls, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> Watched:
        found, step = cls(), scheduler.step

        @functools.wraps(step)  # pipelines look whether a scheduler takes eta
        def watched(output: Tensor, timestep: Any, sample: Tensor, **settings: Any) -> Any:
            if found.before is None:
                monkeypatch.delattr(scheduler, "step")
                found.before = copy.deepcopy(scheduler)
                monkeypatch.setattr(scheduler, "step", watched, raising=False)
            found.taken.append(((output, timestep, sample), settings))
            return step(output, timestep, sample, **settings)

        monkeypatch.setattr(scheduler, "step", watched, raising=False)
        return found

    def again(self, shifts: list[Tensor]) -> Tensor:
        """What the last of as many steps leads to, each from the sample it was taken from, with the outputs shifted and
        the same noise every time."""
        scheduler, end = copy.deepcopy(self.before), torch.empty(0)
        for shift, ((output, timestep, sample), settings) in zip(shifts, self.taken, strict=False):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                end = scheduler.step(output + shift, timestep, sample, **settings)[0]
        return end


def output_shift(kind: str, sigma: float, score: Tensor, prediction: str) -> Tensor:
    """By how much a network's output is another one where its score is ``score`` higher: ``eps = -sigma score``, and
    the latents, ``alpha z0 + sigma eps``, are the same."""
    if kind in ("sd3", "flux"):
        shift = -sigma * score - sigma**2 / (1 - sigma) * score  # eps - z0
        return diffusers.FluxPipeline._pack_latents(shift, *shift.shape) if kind == "flux" else shift
    alpha = (1 - sigma**2) ** 0.5
    return -sigma * score if prediction == "epsilon" else -sigma / alpha * score  # v: alpha eps - sigma z0


FLOW = (FlowMatchEulerDiscreteScheduler, {})
NOISY_FLOW = (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True})
UNCLIPPED: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": True}
DDIM = (DDIMScheduler, UNCLIPPED)
DDPM = (DDPMScheduler, {"clip_sample": False, "timestep_spacing": "leading"})
V = {"prediction_type": "v_prediction"}


def guided_call(pipe: Any, kind: str, monkeypatch: pytest.MonkeyPatch, eta: float | None = None) -> Any:
    """A guided call: the scheduler's steps, and the latents before and after the callback."""
    told, call = ({}, {}) if eta is None else ({"eta": eta}, {"eta": eta})
    guided = GuidanceCallback(linear_value(pipe), "a cat", strength=STRENGTH, window=(0.0, 1.0), **HEIGHT_WIDTH, **told)
    watched, seen = Watched.over(pipe.scheduler, monkeypatch), Recorder(guided)
    torch.manual_seed(3)
    run(pipe, kind, seen, **call)
    return watched, seen, guided


def stays(before: Tensor, after: Tensor, step: int, sigmas: list[float]) -> bool:
    """Whether a step is left alone: from pure noise on the flow path, where ``alpha`` is 0, and to clean latents."""
    if sigmas[step] == 1 or sigmas[step + 1] == 0:
        assert torch.equal(before, after)
        return True
    return False


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}], ids=["plain", "karras"])
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, DEISMultistepScheduler])
def test_levels_are_those_a_scheduler_steps_between(scheduler, settings, steps):
    """Its timesteps are rounded: spaced as Karras, several are the same."""
    chosen = scheduler(beta_schedule="scaled_linear", **settings)
    time = DiscreteTime.of(chosen)
    chosen.set_timesteps(steps)
    expected = [float(chosen._sigma_to_alpha_sigma_t(sigma)[1]) for sigma in chosen.sigmas[:-1]] + [0.0]
    for found in (time.grid(steps), pipeline_levels(chosen, time)):
        torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("kind", "scheduler", "eta"),
    [
        ("sd3", FLOW, None), ("flux", FLOW, None), ("sd3", NOISY_FLOW, None), ("flux", NOISY_FLOW, None),
        ("sd", DDIM, None), ("sd", DDIM, 0.0), ("sd", DDIM, 0.6), ("xl", DDIM, 1.0), ("sd", DDPM, None),
        ("sd", (DDIMScheduler, UNCLIPPED | V), 1.0), ("sd", (DDPMScheduler, DDPM[1] | V), None),
        ("xl", (EulerDiscreteScheduler, {}), None), ("xl", (EulerDiscreteScheduler, V), None),
        ("xl", (EulerDiscreteScheduler, {"use_karras_sigmas": True}), None),
        ("xl", (EulerAncestralDiscreteScheduler, {}), None), ("sd", (EulerAncestralDiscreteScheduler, V), None),
        ("sd", (DPMSolverMultistepScheduler, {"solver_order": 1}), None),
        ("sd", (DPMSolverMultistepScheduler, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}), None),
    ],
)  # fmt: skip
def test_a_step_lands_where_the_shifted_score_would_have_led_it(pipelines, kind, scheduler, eta, monkeypatch):
    """``step`` of the very scheduler, from the very sample, with the network's output as it was and as it would be."""
    pipe = with_scheduler(pipelines[kind], scheduler[0], **scheduler[1])
    watched, seen, guided = guided_call(pipe, kind, monkeypatch, eta)
    sigmas, predicts = levels(pipe, kind), pipe.scheduler.config.get("prediction_type", "epsilon")
    moved = 0
    for step, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
        if stays(before, after, step, sigmas):
            continue
        still = [torch.zeros_like(seen.before[0])] * (step + 1)
        shifted = [*still[:-1], output_shift(kind, sigmas[step], STRENGTH * gradient(), predicts)]
        expected = watched.again(shifted) - watched.again(still)
        torch.testing.assert_close(after - before, expected, rtol=2e-3, atol=2e-5)
        assert expected.abs().max() > 0.05
        moved += 1
    assert moved == STEPS - 1 - (sigmas[0] == 1)
    assert len(guided.history) == STEPS - 1


@pytest.mark.parametrize(
    ("scheduler", "settings", "remembers"),
    [
        (PNDMScheduler, {}, "noise"),
        (DEISMultistepScheduler, {"solver_order": 3}, "noise"),
        (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            "noise",
        ),
        (DPMSolverMultistepScheduler, {}, "clean"),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, "clean"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "clean"),
    ],
)
def test_a_multistep_scheduler_moves_as_if_what_it_remembers_were_shifted_as_much(
    pipelines, scheduler, settings, remembers, monkeypatch
):
    """All outputs up to the step are shifted so that each predicts the noise, or the clean latent, that this step's
    score is shifted by."""
    pipe = with_scheduler(pipelines["sd"], scheduler, **settings)
    watched, seen, guided = guided_call(pipe, "sd", monkeypatch)
    sigmas, moved = levels(pipe, "sd"), 0
    for step, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
        if stays(before, after, step, sigmas):
            continue
        again = step and sigmas[step] == sigmas[step + 1]  # PNDM's second step goes back to where the first began
        noise, sigma = {}, sigmas[step - 1 if again else step]
        for k in range(step + 1):
            signal = sigma / (1 - sigma**2) ** 0.5 * (1 - sigmas[k] ** 2) ** 0.5 / sigmas[k]
            noise[k] = -sigma * STRENGTH * gradient() * (1.0 if remembers == "noise" else signal)
        still = [torch.zeros_like(before)] * (step + 1)
        expected = watched.again([noise[k] for k in range(step + 1)]) - watched.again(still)
        torch.testing.assert_close(after - before, expected, rtol=2e-3, atol=5e-5)
        assert expected.abs().max() > 0.05
        moved += 1
    assert moved == len(guided.history) == len(seen.before) - 1


def test_noise_makes_guidance_stronger(pipelines):
    """By ``alpha' sigma^2 / alpha`` for ``sigma (sigma - sigma') / alpha``: what is kept of the predicted noise takes
    part of a shift back, and renoising keeps nothing."""
    shifts = []
    for cls, settings in (FLOW, NOISY_FLOW):
        pipe = with_scheduler(pipelines["sd3"], cls, **settings)
        seen = Recorder(GuidanceCallback(linear_value(pipe), "a cat", strength=STRENGTH, window=(0.5, 0.5)))
        run(pipe, "sd3", seen, num_inference_steps=28)
        shifts.append((seen.after[13] - seen.before[13]).abs().mean())
    sigma, lower = levels(pipe, "sd3")[13:15]
    stronger = (1 - lower) * sigma / (sigma - lower)
    assert stronger > 5
    torch.testing.assert_close(shifts[1] / shifts[0], torch.tensor(stronger), rtol=1e-3, atol=0)


# -- schedulers whose step is not known


class Own(DDIMScheduler):
    """A step of one's own."""

    def step(self, *given: Any, **settings: Any) -> Any:
        return super().step(*given, **settings)


class Renamed(DDIMScheduler):
    """The step of the class it derives from."""


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (UniPCMultistepScheduler, {}, "step of UniPCMultistepScheduler is not known; give .* one of FlowMatch.* DDIM"),
        (LCMScheduler, {}, "step of LCMScheduler is not known"),
        (Own, UNCLIPPED, "step of Own is not known"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
         "step of DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver' is not known; .* dpmsolver, dpm"),
        (DDIMScheduler, {"clip_sample": True}, r"DDIMScheduler clips .*: DDIMScheduler.from_config\(.*_sample=False\)"),
        (DDPMScheduler, {"clip_sample": False, "thresholding": True}, r"DDPMScheduler clips .*, thresholding=False\)"),
        (DPMSolverMultistepScheduler, {"thresholding": True}, "clips its clean latents"),
    ],
)  # fmt: skip
def test_steps_that_are_not_known_are_refused_before_the_second(pipelines, scheduler, settings, message):
    pipe = with_scheduler(pipelines["sd"], scheduler, **settings)
    seen = Recorder(GuidanceCallback(linear_value(pipe), "a cat", window=(0.8, 1.0), **HEIGHT_WIDTH))
    with pytest.raises(ConfigError, match=message):
        run(pipe, "sd", seen)
    assert len(seen.before) == 1
    run(pipe, "sd", resampling(pipe), batch=2, num_images_per_prompt=2)  # which knows no step


def test_a_class_that_keeps_the_step_is_known(pipelines):
    ends = []
    for cls in (DDIMScheduler, Renamed):
        pipe = with_scheduler(pipelines["sd"], cls, **UNCLIPPED)
        ends.append(run(pipe, "sd", GuidanceCallback(linear_value(pipe), "a cat", strength=STRENGTH, **HEIGHT_WIDTH)))
    assert torch.equal(*ends)


def test_eta_is_ddims(pipelines):
    pipe = pipelines["sd3"]
    with pytest.raises(ConfigError, match="eta is 1, but a FlowMatchEulerDiscreteScheduler takes none"):
        run(pipe, "sd3", GuidanceCallback(linear_value(pipe), "a cat", eta=1.0))
    with pytest.raises(ConfigError, match="eta is 1.5; give a finite number from 0 to 1"):
        GuidanceCallback(linear_value(pipe), "a cat", eta=1.5)
