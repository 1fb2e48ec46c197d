"""Particles against closed forms: unbiased resampling, carried weights, the tilted distribution."""

from __future__ import annotations

import math
from itertools import pairwise

import attrs
import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward, MomentReward, QuadraticReward
from problems import problem, weighted_moments
from stitchvm.core import (
    Aligner,
    ConfigError,
    CostMeter,
    Ode,
    OnPath,
    Sde,
    Tweedie,
    VariancePreservingPath,
    effective_sample_size,
    load_aligner,
)
from stitchvm.core.alignment.particles import initial_noise

POTENTIALS = ("diff", "max", "add", "rt")
PROMPTS = 40


def fk(**settings) -> Aligner:
    return load_aligner("fk-steering")(**settings)


# -- randomness -------------------------------------------------------------------------------------------------------


def test_initial_noise_depends_on_prompt_and_particle_only():
    noise = initial_noise(3, [0, 1, 2], 4, (3, 2, 2))
    assert torch.equal(initial_noise(3, [2], 2, (3, 2, 2)), noise[2:, :2])
    assert not torch.equal(initial_noise(4, [2], 2, (3, 2, 2)), noise[2:, :2])
    assert len({float(x) for x in noise[:, :, 0, 0, 0].flatten()}) == 12


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed is -1"):
        initial_noise(-1, [0], 1, (1, 1, 1))


# -- FK steering: the target


@attrs.frozen(eq=False)
class EndPoint:
    """The reward of where the ODE's remaining steps lead: the exact value of a deterministic sampler."""

    reward: MomentReward
    sigmas: torch.Tensor

    def __call__(self, latents, sigma, context, prediction=None):
        step = int((self.sigmas - sigma[0]).abs().argmin())
        for level, following in pairwise(self.sigmas[step:]):
            latents = Ode()(context.denoiser(latents, level), following.expand(len(latents))).mean
        return self.reward.expectation(latents, 0.0)


def test_exact_value_of_a_deterministic_sampler_keeps_the_weights_uniform():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    task = problem(backbone, reward, None, prompts=3, particles=8, steps=20)
    task = attrs.evolve(task, estimator=EndPoint(reward, task.sigmas))
    found = fk(kernel="ode", strength=3.0).run(task)
    first, *later = found.history
    assert (first.ess < 7.5).all()
    assert len(later) == 3
    for look in later:
        assert torch.allclose(look.ess, torch.full((3,), 8.0), rtol=1e-4)
    assert torch.allclose(found.weights, torch.full((3, 8), 1 / 8), rtol=1e-3)


def test_exact_soft_value_is_a_martingale_under_the_kernel():
    """``E[exp(V_k+1 - V_k)]`` is 1 for the soft value of the discretised chain, which is linear in ``z_t`` here."""
    backbone, strength, steps = GaussianBackbone(), 2.0, 8
    reward = LinearReward()
    settings = fk(strength=strength, ess_threshold=0.0, interval=1, window=(0.0, 1.0))
    task = problem(backbone, reward, None, prompts=1500, particles=1, steps=steps)
    slopes = chain_slopes(backbone, settings.transition_kernel(), task.sigmas)

    @attrs.frozen(eq=False)
    class SoftValue:
        def __call__(self, latents, sigma, context, prediction=None):
            slope, offset, variance = slopes[int((task.sigmas - sigma[0]).abs().argmin())]
            shape = (-1, 1, 1)
            mean = slope.view(shape) * latents + offset.view(shape)
            return reward.soft_expectation(mean, variance.view(shape).expand_as(mean[0]), strength) / strength

    found = settings.run(attrs.evolve(task, estimator=SoftValue()))
    values = torch.stack([strength * look.values[:, 0] for look in found.history])
    increments = (values[1:] - values[:-1]).exp().double()
    error = increments.std(1) / increments.shape[1] ** 0.5
    assert (error < 0.05).all()
    assert ((increments.mean(1) - 1).abs() < 4.5 * error).all()


def chain_slopes(backbone, kernel, sigmas):
    """Per step ``(slope, offset, variance)`` ``[C]`` of the final latent given the one at that step."""
    side, rest = backbone.native_resolution, (torch.ones(3), torch.zeros(3), torch.zeros(3))
    found = [rest]
    probes = torch.stack([level.expand(3, side, side) for level in torch.tensor([0.0, 1.0])])
    for sigma, following in reversed(list(pairwise(sigmas))):
        step = kernel(backbone.denoise(probes, sigma, backbone.null_condition()), following.expand(2))
        offset, slope = step.mean[0, :, 0, 0], (step.mean[1] - step.mean[0])[:, 0, 0]
        a, b, variance = rest
        rest = (a * slope, b + a * offset, variance + a**2 * step.std[0] ** 2)
        found.append(rest)
    return found[::-1]


TARGETED = [
    *({"potential": potential, "resampler": resampler, "ess_threshold": threshold}
      for potential in POTENTIALS for resampler, threshold in (("multinomial", 1.0), ("systematic", 0.5))),
    *({"resampler": resampler} for resampler in ("stratified", "residual", "ssp")),
    {"tempering": 0.2}, {"interpolant": "variance-preserving"},
]  # fmt: skip


@pytest.mark.parametrize("settings", TARGETED, ids=lambda settings: "-".join(map(str, settings.values())))
def test_weighted_particles_follow_the_tilted_distribution(settings):
    """Mean and variance of ``p(z0) exp(strength r)``, ``p`` the kernel's own marginal in exactly these steps."""
    backbone, reward, strength = GaussianBackbone(side=1), QuadraticReward(centre=1.0, scale=0.5, side=1), 1.0
    method = fk(strength=strength, interval=2, **settings)
    found = method.run(problem(backbone, reward, Tweedie(reward), prompts=PROMPTS, particles=256, steps=8))
    kernel = OnPath(Sde(), VariancePreservingPath()) if "interpolant" in settings else Sde()
    plain = backbone.marginal(kernel, backbone.sigmas(8, (1, 1)))
    mean, variance = reward.tilted(*plain, strength)
    estimated, second = weighted_moments(found)
    error = estimated.std(0) / PROMPTS**0.5
    assert (error < 0.03).all()
    assert ((mean - plain[0]).abs() > 6 * error).all()
    assert ((estimated.mean(0) - mean).abs() < 4 * error).all()
    assert ((second.mean(0) - mean**2 - variance).abs() < 4 * second.std(0) / PROMPTS**0.5).all()


def test_the_error_falls_with_the_square_root_of_the_particles():
    backbone, reward = GaussianBackbone(side=1), LinearReward(side=1)
    spreads = []
    for particles in (16, 64, 256):
        found = fk(strength=1.0).run(
            problem(backbone, reward, Tweedie(reward), prompts=80, particles=particles, steps=8)
        )
        spreads.append(weighted_moments(found)[0].std(0).mean())
    for coarse, fine in pairwise(spreads):
        assert 1.6 < coarse / fine < 2.4


# -- FK steering: the bookkeeping


@pytest.mark.parametrize("potential", POTENTIALS)
def test_weights_are_carried_through_steps_that_do_not_resample(potential):
    """Never resampled, the product of all potentials is ``exp(strength r)``, negative rewards included."""
    backbone, reward = GaussianBackbone(), QuadraticReward(centre=3.0)
    method = fk(strength=0.7, potential=potential, ess_threshold=0.0, interval=2)
    found = method.run(problem(backbone, reward, Tweedie(reward), prompts=3, particles=5))
    assert (found.rewards < 0).all()
    assert not any(bool(look.resampled.any()) for look in found.history)
    assert len(found.history) == 4
    assert torch.allclose(found.log_weights, (0.7 * found.rewards).log_softmax(1), atol=1e-4)
    assert torch.equal(found.ancestry, torch.arange(5).expand(3, 5))


def test_effective_sample_size_accumulates_while_weights_are_carried():
    backbone, reward = GaussianBackbone(), LinearReward()
    method = fk(strength=2.0, ess_threshold=0.0, interval=1, potential="diff")
    found = method.run(problem(backbone, reward, Tweedie(reward), prompts=2, particles=6))
    for look in found.history:
        assert torch.allclose(look.ess, effective_sample_size(2.0 * look.values).float(), rtol=1e-3)


def test_tempering_holds_early_values_back_by_its_share():
    """``min((1 + tempering)^step - 1, 1)`` of the strength (DAS), by hand."""
    backbone, reward = GaussianBackbone(), LinearReward()
    method = fk(strength=2.0, ess_threshold=0.0, resample_at=(1, 3, 9), unit="step", tempering=0.1)
    found = method.run(problem(backbone, reward, Tweedie(reward), prompts=2, particles=6))
    for look, share in zip(found.history, (0.1, 1.1**3 - 1, 1.0), strict=True):
        assert torch.allclose(look.ess, effective_sample_size(2.0 * share * look.values).float(), rtol=1e-3)


@pytest.mark.parametrize("potential", ["max", "add"])
def test_negative_values_stay_distinguishable(potential):
    """A running maximum that starts at 0 would give all particles of negative reward equal weights."""
    backbone, reward = GaussianBackbone(), QuadraticReward(centre=4.0)
    found = fk(potential=potential, strength=0.5).run(problem(backbone, reward, Tweedie(reward), particles=16))
    assert (found.history[0].values < 0).all()
    assert found.history[0].ess < 15.5


def test_prompts_resample_each_by_its_own_weights():
    backbone, reward = GaussianBackbone(), LinearReward()

    @attrs.frozen(eq=False)
    class FirstPromptOnly:
        def __call__(self, latents, sigma, context, prediction=None):
            value = torch.zeros(len(latents))
            value[0] = 100.0
            return value

    method = fk(ess_threshold=0.5, window=(0.5, 0.5), strength=1.0)
    found = method.run(problem(backbone, reward, FirstPromptOnly(), prompts=2, particles=4))
    (look,) = found.history
    assert look.resampled.tolist() == [True, False]
    assert found.ancestry.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert look.ancestors.tolist() == found.ancestry.tolist()


def test_a_resampled_latent_takes_its_prediction_along():
    """With a deterministic kernel, whoever is resampled goes on exactly as its ancestor alone would have."""
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, Tweedie(reward), prompts=2, particles=6)
    found = fk(kernel="ode", strength=8.0).run(task)
    alone = task.sample()
    assert found.ancestry.tolist() != [list(range(6))] * 2
    for prompt in range(2):
        assert torch.equal(found.latents[prompt], alone[prompt, found.ancestry[prompt]])


def test_one_proposal_is_no_proposal():
    backbone, reward = GaussianBackbone(), LinearReward()
    task = {"prompts": 2, "particles": 4}
    one = fk(proposals=1, proposal_window=(0.0, 1.0)).run(problem(backbone, reward, Tweedie(reward), **task))
    none = fk(proposals=3, proposal_window=(0.5, 0.5)).run(problem(backbone, reward, Tweedie(reward), **task))
    assert torch.equal(one.latents, none.latents)
    assert torch.equal(one.log_weights, none.log_weights)


def test_the_best_proposal_is_kept_and_its_value_reused():
    backbone, reward = GaussianBackbone(), LinearReward()
    value = ExactValue(backbone, reward)
    method = fk(proposals=3, interval=2, window=(0.0, 1.0), proposal_window=(0.0, 0.5), strength=1.0)
    found = method.run(problem(backbone, reward, value, prompts=2, particles=4, steps=8))
    # Before step 0 nothing is known; 4 steps of proposals; steps 2 and 4 follow one; step 6 does not.
    assert value.seen == [8, 24, 24, 24, 24, 8]
    # The end is no step: there the clean reward closes the product.
    assert [look.step for look in found.history] == [0, 2, 4, 6]
    more = [
        fk(proposals=m, strength=0.0).run(problem(backbone, reward, value, prompts=300, particles=1)).rewards[:, 0]
        for m in (1, 2, 6)
    ]
    for fewer, many in pairwise(more):
        gain = many - fewer
        assert gain.mean() > 4 * gain.std() / 300**0.5


def test_proposal_values_belong_to_the_kept_latents():
    backbone, reward = GaussianBackbone(), LinearReward()
    method = fk(proposals=3, interval=1, window=(0.2, 0.3), proposal_window=(0.0, 0.4), strength=0.0)
    task = problem(backbone, reward, None, prompts=2, particles=4, steps=10)
    seen = []

    @attrs.frozen(eq=False)
    class Spy:
        inner: ExactValue

        def __call__(self, latents, sigma, context, prediction=None):
            seen.append((latents, self.inner(latents, sigma, context)))
            return seen[-1][1]

    found = method.run(attrs.evolve(task, estimator=Spy(ExactValue(backbone, reward))))
    assert [look.step for look in found.history] == [2, 3]
    for look in found.history:
        _, values = seen[look.step - 1]
        assert torch.equal(look.values.flatten(), values.view(-1, 3).amax(1))


@pytest.mark.parametrize("batch", [1, 3, 7, 64])
@pytest.mark.parametrize("settings", [{}, {"proposals": 3, "kernel": "ancestral"}], ids=["plain", "proposals"])
def test_results_do_not_depend_on_the_batch_size(batch, settings):
    backbone, reward = GaussianBackbone(), LinearReward()
    task = {"prompts": 3, "particles": 4, "guidance_scale": 2.0}
    whole = fk(**settings).run(problem(backbone, reward, Tweedie(reward), **task))
    parts = fk(**settings).run(problem(backbone, reward, Tweedie(reward), batch=batch, **task))
    assert torch.equal(whole.latents, parts.latents)
    assert torch.equal(whole.log_weights, parts.log_weights)
    assert torch.equal(whole.rewards, parts.rewards)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_tweedie_at_a_resampling_step_costs_no_denoiser_pass(guidance_scale):
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, Tweedie(reward), prompts=2, particles=4, steps=10, guidance_scale=guidance_scale)
    with CostMeter() as cost:
        found = fk().run(task)
    looks = len(found.history)
    assert looks == 2
    assert cost.passes["denoiser"] == 10 * 8 * (1 if guidance_scale == 1 else 2)
    assert cost.passes["decoder"] == cost.passes["reward"] == (looks + 1) * 8


# -- settings


def test_windows_are_the_papers():
    method = fk(proposals=2)
    forty, twenty_eight = (torch.linspace(1, 0, steps + 1) for steps in (40, 28))
    assert method.resampling_steps(forty) == [8, 12, 16, 20, 24, 28, 32]
    assert method.resampling_steps(twenty_eight) == [6, 10, 14, 18, 22]
    assert method.proposal_steps(forty) == list(range(16))


@pytest.mark.parametrize(
    "settings",
    [{"strength": -1.0}, {"strength": math.inf}, {"interval": 0}, {"window": (0.8, 0.2)}, {"window": (0.0, 1.5)},
     {"potential": "sum"},
     {"ess_threshold": 1.5}, {"eta": 0.5}, {"kernel": "ancestral", "scale": 2.0}, {"kernel": "ancestral", "eta": 2.0},
     {"kernel": "ode", "proposals": 2}, {"diffusion": "cubic"}, {"resampler": "comb"}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}|{list(settings)[-1]}|kernel"):
        fk(**settings)


def test_steering_needs_an_estimator():
    with pytest.raises(ConfigError, match="needs a value"):
        fk().run(problem(GaussianBackbone(), LinearReward(), None))
