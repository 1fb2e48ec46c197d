"""Monte Carlo rollouts where the value, its variance over rollouts and the kernel's own errors are closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward, MomentReward, QuadraticReward
from stitchvm.core import (
    Ancestral,
    Condition,
    ConfigError,
    CostMeter,
    Denoiser,
    Estimator,
    FlowPath,
    Kernel,
    MonteCarlo,
    Ode,
    Prompted,
    Sde,
    Tweedie,
    VariancePreservingPath,
    clean_reward,
)
from stitchvm.core.monte_carlo import levels_below
from stitchvm.core.testing.gaussian import AnalyticBackbone
from stitchvm.core.testing.mixture import LogSumExpReward, MixtureBackbone

PATHS = [FlowPath(), VariancePreservingPath()]
ROWS = 300
RANDOM = 4.5
"""Standard errors that an estimate may be away from the truth."""
SQUARES = 1 + 0.5**2 + 0.25**2
"""The sum of the linear reward's squared weights."""
STEEP = LogSumExpReward(((1.5, 0.75, 0.0), (-1.5, 0.0, 0.75)), side=1)


def context(
    backbone: AnalyticBackbone, samples: int, guidance_scale: float = 1.0, prompts: list[str] | None = None
) -> Prompted:
    condition = backbone.encode_prompts(prompts or [""] * samples)
    return Prompted(Denoiser(backbone, condition, backbone.null_condition(), guidance_scale), Condition())


def noisy(backbone: AnalyticBackbone, sigma: float, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    clean = backbone.draw(samples, generator)
    return backbone.path.add_noise(clean, torch.randn(clean.shape, generator=generator), sigma)


def neighbours(sigma: float) -> torch.Tensor:
    """``[ROWS]`` levels so close that only the noise of their rollouts differs."""
    return sigma + 2e-6 * torch.arange(ROWS)


def independent(estimator: Estimator, backbone: AnalyticBackbone, latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """``[ROWS]`` independent values of one latent ``[1, C, h, w]``."""
    return estimator(latent.expand(ROWS, -1, -1, -1), neighbours(sigma), context(backbone, ROWS))


def chain(
    backbone: AnalyticBackbone, kernel: Kernel, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slope, offset and variance ``[C]`` of where rollouts along ``levels [steps + 1]`` end, in the Gaussian world,
    where every step is affine."""
    side, channels = backbone.native_resolution, backbone.latent_channels
    probes = torch.stack([torch.full((channels, side, side), level) for level in (0.0, 1.0)])
    slope, offset, variance = torch.ones(channels), torch.zeros(channels), torch.zeros(channels)
    for sigma, following in pairwise(levels):
        step = kernel(backbone.denoise(probes, sigma, backbone.null_condition()), following.expand(2))
        base, tilt = step.mean[0, :, 0, 0], (step.mean[1] - step.mean[0])[:, 0, 0]
        slope, offset, variance = tilt * slope, base + tilt * offset, tilt**2 * variance + step.std[0] ** 2
    return slope, offset, variance


def linear_moments(
    reward: LinearReward, latent: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Mean and variance of a linear reward of where rollouts from ``latent`` end: the variance falls with the
    positions it is averaged over."""
    slope, offset, variance = (each[:, None, None] for each in found)
    positions = latent.shape[-1] * latent.shape[-2]
    weight, _, _ = reward.coefficients()
    return float(reward.expectation(slope * latent + offset, 0.0)), float((weight**2 * variance).sum() / positions)


# -- levels


def test_levels_of_an_even_schedule_are_even():
    levels = levels_below(torch.linspace(1, 0, 9), torch.tensor([0.8, 0.2]))
    assert torch.allclose(levels, torch.tensor([0.8, 0.2]) * torch.linspace(1, 0, 9)[:, None], atol=1e-6)


def test_levels_from_the_top_are_the_schedule():
    schedule = GaussianBackbone(path=PATHS[1]).sigmas(7, (2, 2))
    assert torch.allclose(levels_below(schedule, schedule[:1])[:, 0], schedule, atol=1e-6)
    assert torch.allclose(levels_below(schedule, torch.ones(1))[1:, 0], schedule[1:], atol=1e-6)


def test_levels_keep_the_pace_of_a_shifted_schedule():
    """``s(u) = 3 u / (1 + 2 u)``, entered at ``u_0 = s^-1(sigma)``, is left at ``s(u_0 (1 - k / steps))``."""
    times = torch.linspace(1, 0, 65)
    sigma = torch.tensor([0.9, 0.5, 0.1])
    levels = levels_below(3 * times / (1 + 2 * times), sigma)
    left = times[:, None] * (sigma / (3 - 2 * sigma))
    assert torch.allclose(levels, 3 * left / (1 + 2 * left), atol=1e-3)
    assert not torch.allclose(levels, sigma * (3 * times / (1 + 2 * times))[:, None], atol=0.05)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_levels_fall_from_sigma_to_zero(steps):
    schedule = GaussianBackbone(path=PATHS[1]).sigmas(steps, (2, 2))
    sigma = torch.tensor([1.0, 0.99, 0.5, 1e-4])
    levels = levels_below(schedule, sigma)
    assert levels.shape == (steps + 1, 4)
    assert torch.equal(levels[0], sigma)
    assert (levels[-1] == 0).all()
    assert (levels.diff(dim=0) < 0).all()


# -- the value


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("sigma", [0.3, 0.9])
def test_a_linear_reward_is_unbiased_under_the_posterior_kernel(path, sigma):
    """Ancestral steps keep ``E[z0 | z_t]`` at any number of them, wherever the denoiser is exact and linear."""
    backbone, reward = GaussianBackbone(path=path), LinearReward()
    latent = noisy(backbone, sigma, 1)
    values = independent(MonteCarlo(reward, 2, 3, kernel=Ancestral()), backbone, latent, sigma)
    error = values.std() / ROWS**0.5
    assert error < 0.02
    assert abs(values.mean() - reward.expectation(*backbone.posterior(latent, sigma))) < RANDOM * error


@pytest.mark.parametrize("rollouts", [1, 4])
def test_mean_and_variance_are_those_of_the_kernel_over_the_rollouts(rollouts):
    """``Var = sum w^2 Var[z0] / positions / rollouts``; a sample variance has a relative error of ``sqrt(2 / n)``."""
    backbone, reward, sigma, kernel = GaussianBackbone(), LinearReward(), 0.6, Sde()
    latent = noisy(backbone, sigma, 1)
    values = independent(MonteCarlo(reward, rollouts, 8, kernel=kernel), backbone, latent, sigma)
    ends = chain(backbone, kernel, sigma * torch.linspace(1, 0, 9))
    mean, variance = linear_moments(reward, latent, ends)
    assert abs(values.mean() - mean) < RANDOM * (variance / rollouts / ROWS) ** 0.5
    assert abs(values.var() / (variance / rollouts) - 1) < RANDOM * (2 / ROWS) ** 0.5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_fine_ancestral_rollouts_end_in_the_posterior(path):
    """The mean is the posterior's at any number of steps; the variance lacks a share that falls with their size, so
    that four times the steps leave about a quarter of it."""
    backbone, reward, sigma = GaussianBackbone(path=path), LinearReward(), 0.7
    latent = noisy(backbone, sigma, 1)
    mean, variance = backbone.posterior(latent, sigma)
    missing = []
    for steps in (32, 128, 512):
        levels = levels_below(backbone.sigmas(steps, (2, 2)), torch.tensor([sigma]))[:, 0]
        found = linear_moments(reward, latent, chain(backbone, MonteCarlo(reward).kernel, levels))
        assert found[0] == pytest.approx(float(reward.expectation(mean, variance)), abs=1e-5)
        missing.append(1 - found[1] / (float(variance) * SQUARES / 4))
    assert missing[0] < 0.13
    for coarse, fine in pairwise(missing):
        assert 3 < coarse / fine < 5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_fine_sde_rollouts_keep_the_marginal_and_not_the_posterior(path):
    """From ``z_t`` at its own marginal they end in the prior, ``slope^2 Var[z_t] + Var = deviation^2``, but given
    ``z_t`` they vary less than the posterior and depend on it more."""
    backbone, sigma, steps = GaussianBackbone(path=path), torch.tensor([0.7]), 512
    levels = levels_below(backbone.sigmas(steps, (2, 2)), sigma)[:, 0]
    slope, offset, variance = chain(backbone, Sde(), levels)
    alpha = path.alpha(sigma)
    assert torch.allclose(slope * alpha * 0.3 + offset, torch.full((3,), 0.3), rtol=0.01)
    assert torch.allclose(slope**2 * (alpha**2 * 0.64 + sigma**2) + variance, torch.full((3,), 0.64), rtol=0.01)
    _, posterior = backbone.posterior(torch.zeros(1, 3, 2, 2), sigma)
    assert (variance < 0.7 * float(posterior)).all()


def test_an_sde_with_the_noise_of_the_forward_process_ends_in_the_posterior():
    """``g^2 = 2 sigma / (1 - sigma)`` on the flow path, to first order in the steps' size."""
    backbone, sigma = GaussianBackbone(), torch.tensor([0.7])
    _, posterior = backbone.posterior(torch.zeros(1, 3, 2, 2), sigma)
    errors = []
    for steps in (32, 128):
        levels = levels_below(backbone.sigmas(steps, (2, 2)), sigma)[:, 0]
        _, _, variance = chain(backbone, Sde("grpo", 2**0.5), levels)
        errors.append(abs(float(variance[0]) / float(posterior) - 1))
    assert errors[0] < 0.03
    assert 3 < errors[0] / errors[1] < 5


def test_the_variance_is_the_posteriors_over_the_rollouts():
    backbone, reward, sigma = GaussianBackbone(), LinearReward(), 0.5
    latent = noisy(backbone, sigma, 1)
    values = independent(MonteCarlo(reward, 2, 40, kernel=Ancestral()), backbone, latent, sigma)
    mean, variance = backbone.posterior(latent, sigma)
    errors = values - reward.expectation(mean, variance)
    # a tenth is missing at 40 steps, see above
    assert abs(errors.square().mean() / (float(variance) * SQUARES / 4 / 2) - 0.9) < RANDOM * (2 / ROWS) ** 0.5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_reward_that_is_not_linear_in_a_world_of_two_modes(path):
    """Against the closed form, from a latent between the modes, where Tweedie's estimate is far off."""
    backbone, reward, sigma = MixtureBackbone(side=1, path=path), STEEP, 0.8
    latent = torch.tensor([0.1, 0.2, -0.1]).view(1, 3, 1, 1)
    exact = ExactValue(backbone, reward)(latent, torch.tensor(sigma), context(backbone, 1))
    values = independent(MonteCarlo(reward, 4, 32, kernel=Ancestral()), backbone, latent, sigma)
    # a first-order error, of 0.15 at 8 steps
    tolerance = RANDOM * values.std() / ROWS**0.5 + 0.04
    assert abs(values.mean() - exact) < tolerance
    assert abs(Tweedie(reward)(latent, torch.tensor(sigma), context(backbone, 1)) - exact) > 4 * tolerance


def test_the_soft_value_is_the_log_of_the_mean_exponential_of_the_rollouts():
    backbone, reward, strength = GaussianBackbone(), QuadraticReward(), 1.7
    latents, sigma, where = noisy(backbone, 0.6, 5), torch.tensor(0.6), context(backbone, 5)
    first, both = (MonteCarlo(reward, rollouts)(latents, sigma, where) for rollouts in (1, 2))
    second = 2 * both - first
    soft = MonteCarlo(reward, 2, soft=True, strength=strength)(latents, sigma, where)
    expected = (((strength * first).exp() + (strength * second).exp()) / 2).log() / strength
    assert torch.allclose(soft, expected, atol=1e-5)
    assert ((soft - both) > 1e-3).all()


def test_the_soft_value_converges_but_for_jensens_part():
    """``r ~ N(m, v)``: ``m + s v / 2`` less ``(exp(s^2 v) - 1) / (2 n s)``, to first order in ``1 / n``."""
    backbone, reward, sigma, strength, rollouts = GaussianBackbone(), LinearReward(), 0.7, 3.0, 64
    latent = noisy(backbone, sigma, 1)
    estimator = MonteCarlo(reward, rollouts, 3, soft=True, strength=strength, kernel=Ancestral())
    values = independent(estimator, backbone, latent, sigma)
    mean, variance = linear_moments(reward, latent, chain(backbone, Ancestral(), sigma * torch.linspace(1, 0, 4)))
    bias = (math.exp(strength**2 * variance) - 1) / (2 * rollouts * strength)
    error = values.std() / ROWS**0.5
    assert strength * variance / 2 > 4 * RANDOM * error
    assert abs(values.mean() - (mean + strength * variance / 2 - bias)) < RANDOM * error


def test_rollouts_run_under_the_samplers_prompt_and_guidance():
    """Noise and world being the same, what a prompt adds to every value is how it moves the posterior mean; the chain
    is affine in the prompt, so that guidance of 2 adds it twice."""
    backbone, reward, sigma = GaussianBackbone(), LinearReward((1.0, 1.0, 1.0)), 0.5
    latents, estimator = noisy(backbone, sigma, 6), MonteCarlo(reward, 1, 3, kernel=Ancestral())
    plain, prompted, guided = (
        estimator(latents, torch.tensor(sigma), context(backbone, 6, scale, [prompt] * 6))
        for prompt, scale in (("", 1.0), ("2", 1.0), ("2", 2.0))
    )
    moved = [reward.expectation(*backbone.posterior(latents, sigma, shift)) for shift in (2.0, 0.0)]
    assert torch.allclose(prompted - plain, moved[0] - moved[1], rtol=1e-4)
    assert torch.allclose(guided - plain, 2 * (prompted - plain), rtol=1e-4)


# -- gradients


@pytest.mark.parametrize("soft", [False, True], ids=["standard", "soft"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_gradients_are_finite_differences(path, soft):
    backbone, reward = MixtureBackbone(side=1, path=path).double(), LogSumExpReward(side=1).double()
    latents = noisy(MixtureBackbone(side=1, path=path), 0.6, 3).double().requires_grad_()
    sigma, estimator = torch.tensor([0.6, 0.3, 0.0]), MonteCarlo(reward, 2, 3, soft=soft, strength=2.0)
    assert torch.autograd.gradcheck(lambda z: estimator(z, sigma, context(backbone, 3)), latents)


def test_the_gradient_passes_through_a_given_prediction():
    backbone, reward = MixtureBackbone(), QuadraticReward()
    latents, sigma, where = noisy(backbone, 0.6, 3).requires_grad_(), torch.tensor(0.6), context(backbone, 3)
    estimator = MonteCarlo(reward, 2, 3)
    known = estimator(latents, sigma, where, where.denoiser(latents, sigma))
    (expected,) = torch.autograd.grad(estimator(latents, sigma, where).sum(), latents)
    (gradient,) = torch.autograd.grad(known.sum(), latents)
    assert torch.equal(gradient, expected)
    assert gradient.abs().amin() > 0


def test_gradients_of_a_linear_reward_are_the_chains_slope():
    backbone, reward, sigma, kernel = GaussianBackbone(), LinearReward(), 0.6, Sde()
    latents = noisy(backbone, sigma, 5).requires_grad_()
    value = MonteCarlo(reward, 3, 4, kernel=kernel)(latents, torch.tensor(sigma), context(backbone, 5))
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    slope, _, _ = chain(backbone, kernel, sigma * torch.linspace(1, 0, 5))
    expected = slope[:, None, None] * reward.coefficients()[0] / 4
    assert torch.allclose(gradient, expected.expand_as(gradient), atol=1e-6)


# -- randomness


def test_latents_of_one_level_are_compared_under_the_same_noise():
    """In the Gaussian world noise moves all values alike: differences have no error at all, whatever the seed."""
    backbone, reward, sigma, kernel = GaussianBackbone(), LinearReward(), 0.6, Ancestral()
    latents = noisy(backbone, sigma, 6)
    exact = reward.expectation(*backbone.posterior(latents, sigma))
    values = [MonteCarlo(reward, 2, 4, kernel=kernel, seed=seed) for seed in range(3)]
    values = [value(latents, torch.tensor(sigma), context(backbone, 6)) for value in values]
    for value in values:
        assert torch.allclose(value - value[0], exact - exact[0], atol=1e-5)
    assert len({round(float(value[0]), 4) for value in values}) == 3


def test_levels_have_noise_of_their_own():
    backbone, reward = GaussianBackbone(), LinearReward()
    values = independent(MonteCarlo(reward, 1, 2), backbone, noisy(backbone, 0.5, 1), 0.5)
    assert len(set(values.tolist())) == ROWS


@pytest.mark.parametrize("soft", [False, True], ids=["standard", "soft"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_values_depend_neither_on_the_batch_size_nor_on_the_order(size, soft):
    backbone, reward = GaussianBackbone(), QuadraticReward()
    latents = noisy(backbone, 0.5, 11)
    sigma = torch.tensor([0.5, 0.7, 0.0, 0.5, 0.3, 0.7, 0.5, 0.0, 1.0, 0.5, 0.3])
    estimator, prompts = MonteCarlo(reward, 3, 4, soft=soft), [str(n) for n in range(11)]
    where = context(backbone, 11, 2.0, prompts)
    whole = estimator(latents, sigma, where)
    parts = [estimator(latents[rows], sigma[rows], where.index(rows)) for rows in torch.arange(11).split(size)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(estimator(latents[order], sigma[order], where.index(order)), whole[order])


def test_the_global_generator_is_left_alone():
    backbone, reward = GaussianBackbone(), LinearReward()
    before = torch.get_rng_state()
    first, again = (
        MonteCarlo(reward)(noisy(backbone, 0.5, 2), torch.tensor(0.5), context(backbone, 2)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)


# -- ends and costs


def test_clean_latents_have_their_clean_reward_from_one_decoding():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    latents, where = noisy(backbone, 0.0, 4), context(backbone, 4)
    with CostMeter() as cost:
        values = MonteCarlo(reward, soft=True, strength=3.0)(latents, torch.tensor(0.0), where)
    assert dict(cost.passes) == {"decoder": 4, "reward": 4}
    assert torch.equal(values, clean_reward(latents, where, reward)[0])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_pure_noise_has_a_value(path):
    """Ancestral rollouts keep the posterior mean at the highest level that the path has, which is the prior's where
    that is 1."""
    backbone, reward, rollouts = GaussianBackbone(path=path), LinearReward(), 64
    latents, highest = noisy(backbone, 1.0, 4), float(backbone.sigmas(1, (2, 2))[0])
    values = MonteCarlo(reward, rollouts, 4, kernel=Ancestral())(latents, torch.tensor(1.0), context(backbone, 4))
    mean, variance = backbone.posterior(latents, highest)
    error = (float(variance[0]) * SQUARES / 4 / rollouts) ** 0.5
    assert (values - reward.expectation(mean, variance)).abs().max() < RANDOM * error


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (3.0, 2)])
def test_rollouts_share_the_first_prediction(scale, passes):
    backbone, reward = GaussianBackbone(), LinearReward()
    latents, sigma, where = noisy(backbone, 0.5, 4), torch.tensor(0.5), context(backbone, 4, scale)
    prediction = where.denoiser(latents, sigma)
    values = []
    for known, first in ((None, 1), (prediction, 0)):
        with CostMeter() as cost:
            values.append(MonteCarlo(reward, 3, 5)(latents, sigma, where, known))
        assert dict(cost.passes) == {"denoiser": passes * 4 * (3 * 4 + first), "decoder": 12, "reward": 12}
    assert torch.equal(*values)


def test_without_noise_it_is_the_reward_at_the_end_of_the_ode():
    backbone, reward, sigma = GaussianBackbone(), QuadraticReward(), 0.5
    latents, where = noisy(backbone, sigma, 4), context(backbone, 4)
    value = MonteCarlo(reward, 1, 5, kernel=Ode())(latents, torch.tensor(sigma), where)
    slope, offset, _ = (each[:, None, None] for each in chain(backbone, Ode(), sigma * torch.linspace(1, 0, 6)))
    assert torch.allclose(value, reward.expectation(slope * latents + offset, 0.0), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rollouts": 0}, "rollouts is 0"), ({"steps": 0}, "steps is 0"), ({"steps": 2.5}, "steps is 2.5"),
     ({"seed": -1}, "seed is -1"), ({"strength": 0.0}, "strength is 0"), ({"strength": math.inf}, "strength is inf")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    reward: MomentReward = LinearReward()
    with pytest.raises(ConfigError, match=message):
        MonteCarlo(reward, **settings)


def test_it_says_that_it_reads_the_denoiser():
    estimator = MonteCarlo(LinearReward())
    assert isinstance(estimator, Estimator)
    assert estimator.through_denoiser
