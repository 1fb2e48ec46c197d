"""A value, a gradient or a reward that is no number: the particle is dropped and reported, the run goes on."""

from __future__ import annotations

import json
from contextlib import nullcontext

import attrs
import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward
from problems import problem
from stitchvm.core import ConfigError, NonFiniteError, align, load_aligner
from stitchvm.core.estimators import clean_reward

POTENTIALS = ("diff", "max", "add", "rt")


def method(name, **settings):
    return load_aligner(name)(**settings)


# -- values


@attrs.frozen(eq=False)
class Lapsing:
    """An estimator that gives no number for the rows that ``lost`` names of a batch, and 0 for the others."""

    lost: tuple[int, ...]

    def __call__(self, latents, sigma, context, prediction=None):
        values = torch.zeros(len(latents))
        values[list(self.lost)] = float("nan")
        return values


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_particle_without_a_value_is_dropped_and_reported(potential):
    """Particle 1 of prompt 0 and particle 3 of prompt 1, at every look: nobody descends from them."""
    task = problem(GaussianBackbone(), LinearReward(), Lapsing((1, 7)), prompts=2)
    steering = method("fk-steering", potential=potential, interval=100, window=(0.25, 0.5))
    with pytest.warns(RuntimeWarning, match="Lapsing gave no finite value for 2 of 8 latents"):
        found = steering.run(task)
    assert 1 not in found.ancestry[0].tolist()
    assert 3 not in found.ancestry[1].tolist()
    assert found.dropped.tolist() == [1, 1]
    assert found.rewards.isfinite().all()
    assert torch.allclose(found.weights.sum(1), torch.ones(2))


def test_a_dropped_particle_that_is_not_replaced_keeps_weight_zero():
    task = problem(GaussianBackbone(), LinearReward(), Lapsing((1,)))
    with pytest.warns(RuntimeWarning, match="dropped"):
        found = method("fk-steering", ess_threshold=0.0).run(task)
    assert found.weights[0, 1] == 0
    assert found.weights[0].sum() == pytest.approx(1)


def test_a_prompt_without_any_value_is_an_error():
    with pytest.raises(NonFiniteError, match="Lapsing gave no finite value for some prompt at sigma"):
        method(
            "fk-steering",
        ).run(problem(GaussianBackbone(), LinearReward(), Lapsing((4, 5, 6, 7)), prompts=2))


@attrs.frozen(eq=False)
class LapsingOverTime:
    """No number for particle 0 above sigma 0.6, and for all the others below."""

    def __call__(self, latents, sigma, context, prediction=None):
        values = torch.zeros(len(latents))
        values[0 if float(sigma[0]) > 0.6 else slice(1, None)] = float("nan")
        return values


def test_a_prompt_whose_particles_are_lost_one_after_the_other_is_an_error():
    """At no look are all values missing, but no particle has had one at each."""
    task = problem(GaussianBackbone(), LinearReward(), LapsingOverTime())
    with (
        pytest.warns(RuntimeWarning, match="dropped"),
        pytest.raises(NonFiniteError, match="no particle of some prompt is left"),
    ):
        method("fk-steering", ess_threshold=0.1).run(task)


def test_an_image_without_a_reward_is_dropped():
    """The judge gives no number for the first image."""

    def judge(latents, context):
        rewards, images = clean_reward(latents, context, LinearReward())
        return rewards.masked_fill(torch.arange(len(rewards)) == 0, float("nan")), images

    task = attrs.evolve(problem(GaussianBackbone(), LinearReward(), None, particles=3), judge=judge)
    with pytest.warns(RuntimeWarning, match="1 finished images have no finite reward"):
        found = method("best-of-n").run(task)
    assert found.dropped.tolist() == [1]
    assert found.best.tolist() == [1 + int(found.rewards[0, 1:].argmax())]
    assert found.weights[0].tolist() == pytest.approx([0, 0.5, 0.5])


class FailsOnTheFirst(LinearReward):
    """No number for the first image of a batch."""

    def rate(self, images, condition):
        found = super().rate(images, condition)
        return found.masked_fill(torch.arange(len(found)) == 0, float("nan"))


def test_a_finished_run_reports_what_was_dropped_and_is_found_again(tmp_path):
    backbone, found = GaussianBackbone(), []
    for _ in range(2):
        warned = nullcontext() if found else pytest.warns(RuntimeWarning, match="1 finished images have no finite")
        with warned:
            found.append(align("best-of-n", backbone, None, ["0", "1"], reward=FailsOnTheFirst(), particles=4,
                               steps=3, out=tmp_path, progress=False))  # fmt: skip
    for result in found:
        rewards = result.particles.rewards
        assert rewards[0, 0].isnan() and torch.equal(
            result.rewards, torch.stack([rewards[0, 1:].max(), rewards[1].max()])
        )
    first, second = json.loads((tmp_path / "align.json").read_text())["samples"]
    assert first["particle_rewards"][0] is None and first["dropped"] == 1
    assert first["reward"] == max(first["particle_rewards"][1:]) and first["best"] > 0
    assert None not in second["particle_rewards"] and second["dropped"] == 0


# -- gradients


class Blind:
    """The exact value without a gradient: of the first ``rows`` it is NaN, of all there is none where that is None."""

    def __init__(self, backbone, reward, rows):
        self.exact, self.rows = ExactValue(backbone, reward), rows

    def __call__(self, latents, sigma, context, prediction=None):
        values = self.exact(latents, sigma, context)
        if self.rows is None:
            return values.detach()
        undefined = (0 * latents[: self.rows]).sum((1, 2, 3)).sqrt()
        return values + torch.cat([undefined, torch.zeros(len(latents) - self.rows)])


@pytest.mark.parametrize("name", ["dps", "das"])
def test_a_value_without_a_gradient_is_no_guide(name):
    backbone, reward = GaussianBackbone(), LinearReward()
    with pytest.raises(ConfigError, match="Blind gives values without a gradient in the latents"):
        method(name).run(problem(backbone, reward, Blind(backbone, reward, None)))
    with pytest.raises(NonFiniteError, match="Blind gave no finite value with a finite gradient for some prompt"):
        method(name).run(problem(backbone, reward, Blind(backbone, reward, 4), prompts=2))


def test_a_row_without_a_gradient_goes_on_without_guidance():
    backbone, reward = GaussianBackbone(), LinearReward()
    runs = {}
    for rows, strength in ((0, 5.0), (2, 5.0), (0, 0.0)):
        task = problem(backbone, reward, Blind(backbone, reward, rows), steps=4)
        warned = pytest.warns(RuntimeWarning, match="2 of 4 latents .* not guided") if rows else nullcontext()
        with warned:
            runs[rows, strength] = method("dps", strength=strength, kernel="ode").run(task).latents[0]
    torch.testing.assert_close(runs[2, 5.0][:2], runs[0, 0.0][:2])
    torch.testing.assert_close(runs[2, 5.0][2:], runs[0, 5.0][2:])
    assert not torch.allclose(runs[0, 5.0][:2], runs[0, 0.0][:2])
