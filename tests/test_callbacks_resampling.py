"""Resampling in unmodified pipeline calls: by its weights, by its seeds, whatever a scheduler remembers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

from pipeline_calls import (
    EACH,
    HEIGHT_WIDTH,
    STEPS,
    Recorder,
    linear_value,
    noise,
    open_all,
    resampling,
    run,
    with_scheduler,
)
from stitchvm.core import NonFiniteError, ResamplingCallback, StitchedValue


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return open_all(tmp_path_factory)


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


# -- values that are not finite


def losing(monkeypatch: pytest.MonkeyPatch, *lost: list[int], number: float = float("nan")) -> None:
    """Have the value's first calls give ``number`` for some rows each."""
    forward, looks = StitchedValue.forward, iter(lost)

    def forgetful(self: StitchedValue, *given: Any, **more: Any) -> torch.Tensor:
        values = forward(self, *given, **more).clone()
        values[next(looks, [])] = number
        return values

    monkeypatch.setattr(StitchedValue, "forward", forgetful)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_particle_without_a_number_is_dropped(pipelines, monkeypatch, number):
    """It is nobody's ancestor, the others share its weight, and the call goes on."""
    pipe = pipelines["sd3"]
    losing(monkeypatch, [1], number=number)
    callback = resampling(pipe, strength=2.0, ess_threshold=1.0, interval=1)
    with pytest.warns(RuntimeWarning, match="1 of 4 values are not finite at sigma 0.75.* particles are dropped"):
        end = run(pipe, "sd3", callback, batch=4, num_images_per_prompt=4)
    assert end.isfinite().all()
    first, second = callback.history[:2]
    kept = [0, 2, 3]
    assert first.values[0].isnan().tolist() == [False, True, False, False]
    weights = (2.0 * first.values[0, kept].double()).softmax(0)
    torch.testing.assert_close(first.ess[0].double(), 1 / weights.square().sum(), rtol=1e-4, atol=0)
    assert set(first.ancestors[0].tolist()) <= set(kept)
    assert second.values.isfinite().all()
    assert second.ess.isfinite().all()


def test_a_dropped_particle_stays_out_until_it_is_replaced(pipelines, monkeypatch):
    """Also where its later values are numbers, of which only the others' make weights."""
    pipe = pipelines["sd3"]
    losing(monkeypatch, [2])
    callback = resampling(pipe, strength=2.0, ess_threshold=0.0, window=(0.0, 1.0), interval=1)
    with pytest.warns(RuntimeWarning, match="1 of 3 values"):
        run(pipe, "sd3", callback, batch=3, num_images_per_prompt=3)
    last = callback.history[-1].values.double()
    assert last.isfinite().all()
    assert callback.log_weights[0, 2] == -torch.inf
    torch.testing.assert_close(callback.log_weights[0, :2], 2.0 * last[0, :2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lost", [([3, 4, 5],), ([3], [4, 5])])
def test_a_prompt_without_any_particle_is_an_error(pipelines, monkeypatch, lost):
    """Lost at once, or one after the other."""
    pipe = pipelines["sd3"]
    losing(monkeypatch, *lost)
    callback = ResamplingCallback(
        linear_value(pipe), ["a cat", "a dog"], ess_threshold=0.0, window=(0.0, 1.0), interval=1, **HEIGHT_WIDTH
    )
    with (
        pytest.warns(RuntimeWarning) if len(lost) > 1 else nullcontext(),
        pytest.raises(NonFiniteError, match="no image of prompt 'a dog' has a value that is finite up to sigma"),
    ):
        run(pipe, "sd3", callback, ["a cat", "a dog"], 6, num_images_per_prompt=3)
    assert len(callback.history) == len(lost) - 1


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
