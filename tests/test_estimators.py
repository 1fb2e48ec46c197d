"""Estimators in the analytic world: which are exact, and how wrong the others are."""

from __future__ import annotations

import pytest
import torch

from analytic import GaussianBackbone, LinearReward, QuadraticReward, exact_stitched
from stitchvm.core import (
    Condition,
    ConfigError,
    CostMeter,
    Denoiser,
    FlowPath,
    MonteCarlo,
    Prompted,
    Stitched,
    Sum,
    Tweedie,
    VariancePreservingPath,
    clean_reward,
)

SIGMAS = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PATHS = [FlowPath(), VariancePreservingPath()]


def context(backbone, samples, guidance_scale=1.0):
    condition = backbone.encode_prompts([""] * samples)
    return Prompted(Denoiser(backbone, condition, backbone.null_condition(), guidance_scale), Condition())


def noisy(backbone, sigma, samples=64):
    generator = torch.Generator().manual_seed(0)
    clean = backbone.draw(samples, generator)
    return backbone.path.add_noise(clean, torch.randn(clean.shape, generator=generator), sigma)


def levels(path):
    """``SIGMAS`` that the path's clean latent can be read from."""
    return SIGMAS if path.name == "flow" else SIGMAS[:-1]


ON_PATHS = pytest.mark.parametrize(
    ("path", "sigma"),
    [pytest.param(path, sigma, id=f"{path.name}-{sigma}") for path in PATHS for sigma in levels(path)],
)


@ON_PATHS
def test_tweedie_is_exact_for_a_linear_reward(path, sigma):
    backbone, reward = GaussianBackbone(path=path), LinearReward()
    latents = noisy(backbone, sigma)
    value = Tweedie(reward)(latents, torch.tensor(sigma), context(backbone, 64))
    assert value.std() > 1e-3 or sigma == 1
    assert torch.allclose(value, reward.expectation(*backbone.posterior(latents, sigma)), atol=2e-5)


@ON_PATHS
def test_tweedie_is_too_high_for_a_concave_reward_by_the_posterior_variance(path, sigma):
    """Jensen: ``r(E[z0]) - E[r(z0)] = scale C Var[z0 | z_t]`` for ``r = -scale |z0 - centre|^2``."""
    backbone, reward = GaussianBackbone(path=path), QuadraticReward(scale=1.5)
    latents = noisy(backbone, sigma)
    _, variance = backbone.posterior(latents, sigma)
    value = Tweedie(reward)(latents, torch.tensor(sigma), context(backbone, 64))
    bias = value - reward.expectation(*backbone.posterior(latents, sigma))
    assert torch.allclose(bias, 1.5 * 3 * variance.flatten(), rtol=1e-3, atol=1e-4)


def test_the_closed_form_is_the_mean_of_the_clean_reward():
    """The closed forms themselves, against draws from the posterior."""
    backbone, reward = GaussianBackbone(), QuadraticReward()
    latents = noisy(backbone, 0.5, samples=1)
    mean, variance = backbone.posterior(latents, 0.5)
    generator = torch.Generator().manual_seed(1)
    draws = mean + variance.sqrt() * torch.randn(20_000, *mean.shape[1:], generator=generator)
    rewards, _ = clean_reward(draws, context(backbone, 20_000), reward)
    assert abs(rewards.mean() - reward.expectation(mean, variance)) < 4 * rewards.std() / 20_000**0.5
    soft = (0.5 * rewards).exp()
    assert abs(soft.mean() - reward.soft_expectation(mean, variance, 0.5).exp()) < 4 * soft.std() / 20_000**0.5


@pytest.mark.parametrize("reward", [LinearReward(), QuadraticReward()], ids=["linear", "quadratic"])
def test_a_stitched_value_can_be_exact_at_every_noise_level(reward):
    backbone = GaussianBackbone()
    value = Stitched(exact_stitched(backbone, reward))
    for sigma in (0.0, *SIGMAS):
        latents = noisy(backbone, sigma)
        expected = reward.expectation(*backbone.posterior(latents, sigma))
        assert torch.allclose(value(latents, torch.tensor(sigma), context(backbone, 64)), expected, atol=1e-5)


def test_estimators_agree_with_the_clean_reward_at_sigma_zero():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    latents, zero = noisy(backbone, 0.0), torch.tensor(0.0)
    clean, images = clean_reward(latents, context(backbone, 64), reward)
    assert images.shape == (64, 3, 2, 2)
    for estimator in (Tweedie(reward), Stitched(exact_stitched(backbone, reward))):
        assert torch.allclose(estimator(latents, zero, context(backbone, 64)), clean, atol=1e-5)


def test_each_estimator_costs_what_it_runs():
    backbone, reward = GaussianBackbone(), LinearReward()
    latents, sigma, where = noisy(backbone, 0.5), torch.tensor(0.5), context(backbone, 64, guidance_scale=3.0)
    prediction = where.denoiser(latents, sigma)
    cases = [
        (Tweedie(reward), None, {"denoiser": 128, "decoder": 64, "reward": 64}),
        (Tweedie(reward), prediction, {"decoder": 64, "reward": 64}),
        (Stitched(exact_stitched(backbone, reward)), prediction, {"head": 64, "tail": 64}),
    ]
    for estimator, known, expected in cases:
        with CostMeter() as cost:
            estimator(latents, sigma, where, known)
        assert dict(cost.passes) == expected


@pytest.mark.parametrize("sigma", [0.25, 0.75])
def test_gradients_are_the_closed_form(sigma):
    """``dV/dz_t`` of a linear reward: the posterior mean's slope times the reward's own gradient."""
    backbone, reward = GaussianBackbone(), LinearReward()
    latents = noisy(backbone, sigma).requires_grad_()
    slope = backbone.posterior(torch.ones(1, 3, 2, 2), sigma)[0] - backbone.posterior(torch.zeros(1, 3, 2, 2), sigma)[0]
    expected = (slope * reward.coefficients()[0] / 4).expand_as(latents)
    for estimator in (Tweedie(reward), Stitched(exact_stitched(backbone, reward))):
        value = estimator(latents, torch.tensor(sigma), context(backbone, 64))
        (gradient,) = torch.autograd.grad(value.sum(), latents)
        assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("prompted", [True, False])
def test_a_prompted_value_reads_what_the_sampler_was_asked_for(prompted):
    """Under prompt "2" the posterior is that of a mean moved by 2; a value that was not trained so reads the null
    prompt whatever is sampled."""
    backbone, reward = GaussianBackbone(), LinearReward()
    value = exact_stitched(backbone, reward)
    value.prompted = prompted
    asked = Denoiser(backbone, backbone.encode_prompts(["2"] * 64), backbone.null_condition())
    latents = noisy(backbone, 0.5)
    read = Stitched(value)(latents, torch.tensor(0.5), Prompted(asked, Condition()))
    truth = reward.expectation(*backbone.posterior(latents, 0.5, 2.0 if prompted else 0.0))
    assert torch.allclose(read, truth, atol=2e-5)


# -- sums


def test_a_sum_is_linear_in_its_parts():
    backbone, linear, quadratic = GaussianBackbone(), LinearReward(), QuadraticReward()
    latents, sigma, where = noisy(backbone, 0.5).requires_grad_(), torch.tensor(0.5), context(backbone, 64)
    parts = (Stitched(exact_stitched(backbone, linear)), Tweedie(quadratic), MonteCarlo(linear, 2, 3))
    weights = (2.0, -0.5, 0.25)
    values = [part(latents, sigma, where) for part in parts]
    value = Sum(parts, weights)(latents, sigma, where)
    assert torch.allclose(value, sum(w * v for w, v in zip(weights, values, strict=True)), atol=1e-6)
    gradients = [torch.autograd.grad(v.sum(), latents)[0] for v in (*values, value)]
    expected = sum(w * g for w, g in zip(weights, gradients[:3], strict=True))
    assert torch.allclose(gradients[3], expected, atol=1e-6)


def test_a_sum_of_one_is_that_estimator_times_its_weight():
    backbone = GaussianBackbone()
    part, arguments = Tweedie(LinearReward()), (noisy(backbone, 0.5), torch.tensor(0.5), context(backbone, 64))
    assert torch.equal(Sum([part], [-2])(*arguments), -2 * part(*arguments))


def test_the_parts_of_a_sum_share_one_prediction():
    backbone, reward = GaussianBackbone(), LinearReward()
    latents, sigma, where = noisy(backbone, 0.5), torch.tensor(0.5), context(backbone, 64)
    prediction = where.denoiser(latents, sigma)
    stitched, tweedie = Stitched(exact_stitched(backbone, reward)), Tweedie(reward)
    cases = [
        ((stitched, tweedie, tweedie), None, 0.5, {"head": 64, "tail": 64, "denoiser": 64}),
        ((stitched, tweedie), prediction, 0.5, {"head": 64, "tail": 64}),
        ((tweedie, tweedie), prediction, 0.5, {}),
        ((tweedie, tweedie), None, 0.0, {}),
    ]
    for parts, known, level, expected in cases:
        judged = 64 * parts.count(tweedie)
        with CostMeter() as cost:
            Sum(parts, [1.0] * len(parts))(latents, torch.tensor(level), where, known)
        assert dict(cost.passes) == {**expected, "decoder": judged, "reward": judged}


def test_an_estimator_says_whether_it_reads_the_denoiser():
    backbone, reward = GaussianBackbone(), LinearReward()
    stitched, tweedie = Stitched(exact_stitched(backbone, reward)), Tweedie(reward)
    assert tweedie.through_denoiser
    assert not getattr(stitched, "through_denoiser", False)
    assert not Sum([stitched, stitched], [1, 1]).through_denoiser
    assert Sum([stitched, Sum([tweedie], [1])], [1, 1]).through_denoiser


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [(0, [], "no estimators"), (2, [1.0], "2 estimators but 1 weights"), (1, [float("nan")], "finite")],
)
def test_a_sum_that_does_not_fit_is_refused(count, weights, message):
    with pytest.raises(ConfigError, match=message):
        Sum([Tweedie(LinearReward())] * count, weights)
