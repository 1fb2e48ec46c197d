"""The analytic worlds themselves, against quadrature and draws from their definitions alone."""

from __future__ import annotations

import math

import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward, QuadraticReward, exact_stitched
from stitchvm.core import (
    Ancestral,
    Condition,
    ConfigError,
    Denoiser,
    FlowPath,
    Ode,
    Path,
    Prompted,
    Sde,
    Stitched,
    Tweedie,
    VariancePreservingPath,
    clean_reward,
    sample,
)
from stitchvm.core.testing import examine
from stitchvm.core.testing.gaussian import HIGHEST, AnalyticBackbone, AnalyticReward
from stitchvm.core.testing.mixture import LogSumExpReward, MixtureBackbone

PATHS = [FlowPath(), VariancePreservingPath()]
RANDOM = 4.5
"""Standard errors that an estimate may be away from the truth."""

MEANS, WEIGHTS, DEVIATION = ((-1.0, 0.5, 0.0), (1.0, 0.0, -0.5)), (0.3, 0.7), 0.4


def world(kind: str, path: Path, **settings) -> AnalyticBackbone:
    return GaussianBackbone(path=path, **settings) if kind == "gaussian" else MixtureBackbone(path=path, **settings)


def rewards(side: int) -> dict[str, AnalyticReward]:
    return {
        "linear": LinearReward(side=side),
        "quadratic": QuadraticReward(side=side, scale=0.5),
        "log-sum-exp": LogSumExpReward(side=side),
    }


EVERY_WORLD = pytest.mark.parametrize(
    ("kind", "path"),
    [pytest.param(kind, path, id=f"{kind}-{path.name}") for kind in ("gaussian", "mixture") for path in PATHS],
)


def context(backbone: AnalyticBackbone, samples: int, prompt: str = "") -> Prompted:
    condition = backbone.encode_prompts([prompt] * samples)
    return Prompted(Denoiser(backbone, condition, backbone.null_condition()), Condition())


def noisy(backbone: AnalyticBackbone, sigma: float, samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    clean = backbone.draw(samples, generator)
    return backbone.path.add_noise(clean, torch.randn(clean.shape, generator=generator), sigma)


def signal(path: Path, sigma: float) -> float:
    """``alpha``, written out once more."""
    return 1 - sigma if path.name == "flow" else math.sqrt(1 - sigma**2)


def weighted(weights: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A self-normalised mean over the first dimension of ``values`` and its standard error."""
    share = (weights / weights.sum()).reshape(-1, *[1] * (values.ndim - 1))
    mean = (share * values).sum(0)
    return mean, (share**2 * (values - mean) ** 2).sum(0).sqrt()


def likelihood(backbone: AnalyticBackbone, clean: torch.Tensor, latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """``p(z_t | z0)`` ``[N]`` up to a factor, for clean latents ``[N, C, h, w]`` and one noisy ``[1, C, h, w]``."""
    rest = (latent - signal(backbone.path, sigma) * clean) / sigma
    logs = -rest.double().square().sum((1, 2, 3)) / 2
    return (logs - logs.max()).exp()


# -- the denoiser


def log_marginal(kind: str, path: Path, sigma: float, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``log p_t(z)`` and ``E[z0 | z]`` ``[N]`` in one dimension, by quadrature over a prior written out here."""
    modes = [(1.0, 0.3, 0.8)] if kind == "gaussian" else [(0.3, -1.0, 0.4), (0.7, 1.2, 0.4)]
    grid = torch.linspace(-7, 7, 20_001, dtype=torch.float64)
    prior = sum(w / d * (-((grid - m) ** 2) / (2 * d**2)).exp() for w, m, d in modes)
    alpha = signal(path, sigma)
    joint = prior * (-((at[:, None] - alpha * grid) ** 2) / (2 * sigma**2)).exp()
    return joint.sum(1).log(), (joint * grid).sum(1) / joint.sum(1)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.95])
@EVERY_WORLD
def test_the_prediction_is_that_of_quadrature(kind, path, sigma):
    """Clean latent, noise, velocity ``alpha' E[z0] + E[eps]`` and score ``d log p_t / dz`` in one dimension."""
    settings = {"channels": 1} if kind == "gaussian" else {"means": ((-1.0,), (1.2,)), "weights": (0.3, 0.7)}
    backbone = world(kind, path, side=1, **settings)
    at = torch.linspace(-2, 2, 9, dtype=torch.float64)
    _, clean = log_marginal(kind, path, sigma, at)
    noise = (at - signal(path, sigma) * clean) / sigma
    slope = -1.0 if path.name == "flow" else -sigma / signal(path, sigma)
    step = 1e-4
    score = (log_marginal(kind, path, sigma, at + step)[0] - log_marginal(kind, path, sigma, at - step)[0]) / (2 * step)
    found = context(backbone, 9).denoiser(at.float().view(9, 1, 1, 1), sigma)
    for name, expected in {"z0": clean, "eps": noise, "velocity": slope * clean + noise, "score": score}.items():
        assert torch.allclose(getattr(found, name).flatten().double(), expected, rtol=1e-4, atol=1e-4), name
    assert clean.diff().abs().min() > 1e-3


@pytest.mark.parametrize("sigma", [0.5, 0.8])
@EVERY_WORLD
def test_posterior_moments_are_those_of_weighted_prior_draws(kind, path, sigma):
    """Three channels of which a component is drawn at once, by self-normalised importance sampling."""
    backbone = world(kind, path, side=1)
    latent = noisy(backbone, sigma, 1, seed=3)
    clean = backbone.draw(100_000, torch.Generator().manual_seed(1))
    weights = likelihood(backbone, clean, latent, sigma)
    mean, variance = backbone.posterior(latent, sigma)
    for values, expected in ((clean, mean), ((clean - mean) ** 2, variance)):
        estimate, error = weighted(weights, values)
        assert (error < 0.05).all()
        assert ((estimate - expected).abs() < RANDOM * error).all()


def test_the_prior_of_a_mixture_is_drawn_a_component_a_latent():
    backbone = MixtureBackbone(MEANS, (3.0, 7.0), deviation=DEVIATION)
    drawn = backbone.draw(20_000, torch.Generator().manual_seed(0), shift=0.5)
    first = drawn[:, 0].mean((1, 2)) < 0.5
    assert abs(first.float().mean() - 0.3) < RANDOM * (0.21 / 20_000) ** 0.5
    for rows, mean in ((first, MEANS[0]), (~first, MEANS[1])):
        error = DEVIATION / (4 * int(rows.sum())) ** 0.5
        # at 7.5 deviations from the border no latent is on the wrong side, so that each side is one component
        assert ((drawn[rows].mean((0, 2, 3)) - 0.5 - torch.tensor(mean)).abs() < RANDOM * error).all()
        assert abs(drawn[rows].std((0, 2, 3)).mean() / DEVIATION - 1) < 0.02


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_mixture_of_one_is_the_gaussian_world(path):
    alone = MixtureBackbone([(0.3, 0.3, 0.3)], [2.0], deviation=0.8, path=path)
    gaussian = GaussianBackbone(path=path)
    latents, sigma = noisy(gaussian, 0.6, 8), torch.tensor(0.6)
    one, other = (context(world, 8, "1").denoiser(latents, sigma) for world in (alone, gaussian))
    assert torch.allclose(one.z0, other.z0, atol=1e-5)
    assert torch.allclose(one.eps, other.eps, atol=1e-5)


@EVERY_WORLD
def test_worlds_keep_what_the_kit_asks_of_a_sliced_network(kind, path):
    """All but a twin's own: there is no upstream, words mean nothing to it, and it comes as it was built."""
    failures = {result.check for result in examine(world(kind, path)).failures}
    assert failures <= {"frozen", "upstream", "prompts", "another-number-of-prompts"}


def test_the_variance_preserving_world_starts_just_below_one():
    backbone = GaussianBackbone(path=PATHS[1])
    levels = backbone.sigmas(5, (2, 2))
    assert levels[0] == pytest.approx(HIGHEST)
    assert levels[-1] == 0
    assert torch.allclose(levels.arcsin().diff(), torch.full((5,), -math.asin(HIGHEST) / 5), atol=1e-4)
    found = context(backbone, 4).denoiser(noisy(backbone, 1.0, 4), torch.tensor(1.0))
    assert torch.allclose(found.sigma, torch.tensor(HIGHEST))
    assert found.z0.isfinite().all()


@pytest.mark.parametrize("kernel", [Ode(), Ancestral(), Sde()], ids=["ode", "ancestral", "sde"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_samplers_end_in_the_gaussian_prior(path, kernel):
    """Closed form at 400 steps; pure noise instead of the marginal at 0.998 moves the end by ``alpha = 0.06`` of the
    mean at most."""
    backbone = GaussianBackbone(path=path)
    mean, variance = backbone.marginal(kernel, backbone.sigmas(400, (2, 2)))
    assert torch.allclose(mean, torch.full((3,), 0.3), atol=0.02 + 0.02 * (path.name != "flow"))
    assert torch.allclose(variance, torch.full((3,), 0.64), rtol=0.03)


def test_sampling_finds_the_modes_in_their_proportions():
    """The ODE in 60 steps: shares to four standard errors, means and deviations to the discretisation's few per
    cent."""
    backbone, samples = MixtureBackbone(MEANS, WEIGHTS, deviation=DEVIATION), 2000
    noise = torch.randn(samples, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = sample(context(backbone, samples).denoiser, noise, backbone.sigmas(60, (2, 2)))
    first = latents[:, 0].mean((1, 2)) < 0
    assert abs(first.float().mean() - 0.3) < RANDOM * (0.21 / samples) ** 0.5
    for rows, mean in ((first, MEANS[0]), (~first, MEANS[1])):
        assert torch.allclose(latents[rows].mean((0, 2, 3)), torch.tensor(mean), atol=0.05)
        assert torch.allclose(latents[rows].std((0, 2, 3)), torch.tensor(DEVIATION), rtol=0.1)


@pytest.mark.parametrize(
    ("means", "weights"), [((), ()), (((0.0,), (1.0,)), (1.0,)), (((0.0,), (1.0, 2.0)), (1, 1)), (((0.0,),), (0.0,))]
)
def test_a_mixture_that_does_not_fit_is_refused(means, weights):
    with pytest.raises(ConfigError, match="a weight above 0 for each of its means"):
        MixtureBackbone(means, weights)


# -- rewards and values


@pytest.mark.parametrize("name", rewards(2))
def test_a_reward_is_its_own_expectation_without_variance(name):
    backbone, reward = MixtureBackbone(), rewards(2)[name]
    latents = noisy(backbone, 0.0, 16)
    rated, _ = clean_reward(latents, context(backbone, 16), reward)
    assert rated.std() > 0.1
    assert torch.allclose(reward.expectation(latents, 0.0), rated, atol=2e-5)
    assert torch.allclose(reward.soft_expectation(latents, torch.zeros(16, 1, 1, 1), 1.0), rated, atol=2e-5)


@pytest.mark.parametrize("name", rewards(1))
@pytest.mark.parametrize("side", [1, 2])
@EVERY_WORLD
def test_exact_values_are_those_of_weighted_prior_draws(kind, path, side, name):
    """``E[r | z_t]`` and ``log E[exp r | z_t]``, by self-normalised importance sampling."""
    backbone, reward, sigma = world(kind, path, side=side), rewards(side)[name], 0.8
    latent = noisy(backbone, sigma, 1, seed=5)
    clean = backbone.draw(40_000, torch.Generator().manual_seed(2))
    weights, rated = likelihood(backbone, clean, latent, sigma), reward.expectation(clean, 0.0)
    arguments = latent, torch.tensor(sigma), context(backbone, 1)
    standard, soft = (ExactValue(backbone, reward, soft=soft)(*arguments) for soft in (False, True))
    for values, expected in ((rated, standard), (rated.exp(), soft.exp())):
        estimate, error = weighted(weights, values)
        assert error < 0.05 * max(1, float(expected))
        assert abs(estimate - expected) < RANDOM * error
    assert soft > standard


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_a_soft_value_is_in_units_of_the_reward(strength):
    """``m + strength v / 2`` for a Gaussian reward, here with ``v = 1.3125 Var[z0] / 4``."""
    backbone, reward, sigma = GaussianBackbone(), LinearReward(), torch.tensor(0.6)
    latents = noisy(backbone, 0.6, 8)
    mean, variance = backbone.posterior(latents, sigma)
    value = ExactValue(backbone, reward, soft=True, strength=strength)(latents, sigma, context(backbone, 8))
    expected = reward.expectation(mean, variance) + strength * 1.3125 * variance.flatten() / 4 / 2
    assert torch.allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["standard", "soft"])
@pytest.mark.parametrize("name", rewards(1))
@EVERY_WORLD
def test_gradients_of_exact_values_are_finite_differences(kind, path, name, soft):
    backbone, reward = world(kind, path, side=1).double(), rewards(1)[name].double()
    latents = noisy(world(kind, path, side=1), 0.5, 4).double().requires_grad_()
    value, sigma = ExactValue(backbone, reward, soft=soft), torch.tensor([0.2, 0.5, 0.7, 0.9])
    assert torch.autograd.gradcheck(lambda z: value(z, sigma, context(backbone, 4)), latents)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.9])
@EVERY_WORLD
def test_tweedie_is_too_high_by_the_posterior_variance(kind, path, sigma):
    """``r(E[z0]) - E[r(z0)]`` of ``-scale |z0 - centre|^2``, averaged over positions, is ``scale`` times the variances'
    sum over channels, whatever the posterior's shape."""
    backbone, reward = world(kind, path), QuadraticReward(scale=1.5)
    latents, where = noisy(backbone, sigma, 16), context(backbone, 16)
    _, variance = backbone.posterior(latents, sigma)
    bias = Tweedie(reward)(latents, sigma, where) - ExactValue(backbone, reward)(latents, sigma, where)
    predicted = 1.5 * variance.expand_as(latents).sum(1).mean((1, 2))
    assert torch.allclose(bias, predicted, rtol=1e-3, atol=1e-4)


@EVERY_WORLD
def test_tweedie_is_too_low_for_a_convex_reward(kind, path):
    backbone, reward, sigma = world(kind, path), LogSumExpReward(((3.0, 0.0, 0.0), (-3.0, 0.0, 0.0))), 0.8
    latents, where = noisy(backbone, sigma, 32), context(backbone, 32)
    gap = ExactValue(backbone, reward)(latents, sigma, where) - Tweedie(reward)(latents, sigma, where)
    assert (gap > -1e-5).all()
    assert gap.max() > 0.05


@EVERY_WORLD
def test_a_linear_layer_can_be_exact_in_every_world(kind, path):
    backbone, reward = world(kind, path), QuadraticReward()
    value = Stitched(exact_stitched(backbone, reward))
    for sigma in (0.0, 0.4, 0.8):
        latents, where = noisy(backbone, sigma, 16), context(backbone, 16)
        arguments = latents, torch.tensor(sigma), where
        assert torch.allclose(value(*arguments), ExactValue(backbone, reward)(*arguments), atol=2e-5)


@EVERY_WORLD
def test_an_exact_value_may_read_the_samplers_prompt(kind, path):
    """Under prompt "2" all of the world, noise apart, is moved by 2: ``V(z + alpha 2 | "2") = V(z) + 2 r'``."""
    backbone, reward, sigma = world(kind, path), LinearReward(), torch.tensor(0.6)
    latents = noisy(backbone, 0.6, 8)
    plain = ExactValue(backbone, reward)(latents, sigma, context(backbone, 8, "2"))
    moved = latents + 2 * signal(path, 0.6)
    prompted = ExactValue(backbone, reward, prompted=True)(moved, sigma, context(backbone, 8, "2"))
    assert torch.allclose(prompted, plain + 2 * 0.75, atol=1e-4)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_a_tilted_mixture_has_the_moments_of_weighted_prior_draws(name, strength):
    backbone, reward = MixtureBackbone(side=1), rewards(1)[name]
    weights, means, variance = backbone.tilted(reward, strength)
    assert weights.sum() == pytest.approx(1)
    clean = backbone.draw(100_000, torch.Generator().manual_seed(4))
    tilt = (strength * reward.expectation(clean, 0.0)).double().exp()
    first = (weights[:, None] * means).sum(0)
    second = (weights[:, None] * (means**2 + variance)).sum(0)
    for power, expected in ((1, first), (2, second)):
        estimate, error = weighted(tilt, clean[:, :, 0, 0] ** power)
        assert (error < 0.02).all()
        assert ((estimate - expected).abs() < RANDOM * error).all()


def test_a_linear_tilt_moves_all_modes_alike():
    """By ``strength d^2 w / positions``, and its odds by ``exp(strength w . (m_1 - m_0))``."""
    backbone, strength = MixtureBackbone(MEANS, WEIGHTS, deviation=DEVIATION), 1.5
    weights, means, variance = backbone.tilted(LinearReward(), strength)
    slope = torch.tensor([1.0, -0.5, 0.25])
    assert torch.allclose(means, torch.tensor(MEANS) + strength * DEVIATION**2 * slope / 4, atol=1e-6)
    assert torch.allclose(variance, torch.full((3,), DEVIATION**2))
    gap = float(slope @ (torch.tensor(MEANS[1]) - torch.tensor(MEANS[0])))
    assert float(weights[1] / weights[0]) == pytest.approx(0.7 / 0.3 * math.exp(strength * gap), rel=1e-5)


def test_closed_forms_of_a_log_of_sums_end_where_they_are_said_to():
    mean, variance = torch.zeros(1, 3, 2, 2), torch.ones(1, 1, 1, 1)
    with pytest.raises(ConfigError, match="at strength 1, not at 2"):
        LogSumExpReward().soft_expectation(mean, variance, 2.0)
    three = LogSumExpReward([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], [0.0, 0.1, 0.2])
    with pytest.raises(ConfigError, match="of 3 terms has no closed form"):
        three.expectation(mean, variance)
    # exp(b + |a|^2 Var / (2 positions)), summed
    total = sum(math.exp(offset + 1 / 8) for offset in (0.0, 0.1, 0.2))
    assert float(three.soft_expectation(mean, variance, 1.0)) == pytest.approx(math.log(total), abs=1e-5)
    one = LogSumExpReward([(1.0, 2.0, 0.0)], [0.5])
    assert float(one.expectation(mean + 1, variance)) == pytest.approx(3.5)
