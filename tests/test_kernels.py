"""Transition kernels in a Gaussian world, where prediction, marginals and densities are known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from stitchvm.core import (
    KERNELS,
    Ancestral,
    FlowPath,
    Kernel,
    Ode,
    Path,
    Prediction,
    Sde,
    Transition,
    VariancePreservingPath,
    spread,
)

MEAN, DEVIATION = 0.4, 0.7
FLOW, PRESERVING = FlowPath(), VariancePreservingPath()
START = {"flow": 1.0, "variance-preserving": 0.99}
"""Where sampling starts: at sigma 1 the variance-preserving velocity is infinite."""

ALL: dict[str, Kernel] = {
    "ode": Ode(),
    "ancestral-0": Ancestral(eta=0.0),
    "ancestral-half": Ancestral(eta=0.5),
    "ancestral": Ancestral(),
    "sde": Sde(),
    "sde-sigma": Sde("sigma", 1.5),
    "sde-constant": Sde("constant", 0.8),
}


def _predict(path: Path, latents: torch.Tensor, sigma: torch.Tensor) -> Prediction:
    """The exact prediction under the prior ``N(MEAN, DEVIATION^2)``."""
    level = spread(sigma, latents)
    alpha = path.alpha(level)
    rest = (latents - alpha * MEAN) / (alpha**2 * DEVIATION**2 + level**2)
    return Prediction(path, latents, sigma, MEAN + alpha * DEVIATION**2 * rest, level * rest)


def _marginal(path: Path, sigma: float) -> tuple[float, float]:
    """Mean and standard deviation of the latents at a noise level."""
    alpha = float(path.alpha(torch.tensor(sigma, dtype=torch.float64)))
    return alpha * MEAN, math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)


def _levels(path: Path, steps: int, stop: float = 0.0) -> torch.Tensor:
    return torch.linspace(START[path.name], stop, steps + 1, dtype=torch.float64)


def _carried(kernel: Kernel, path: Path, levels: torch.Tensor) -> tuple[float, float]:
    """Mean and deviation after all steps, without sampling: with an exact prediction every step is affine."""
    mean, deviation = _marginal(path, float(levels[0]))
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for sigma, following in pairwise(levels):
        transition = kernel(_predict(path, probes, sigma.expand(2)), following.expand(2))
        offset, ahead = transition.mean.flatten().tolist()
        slope, noise = ahead - offset, float(transition.std[0])
        mean, deviation = offset + slope * mean, math.hypot(slope * deviation, noise)
    return mean, deviation


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_every_kernel_keeps_the_marginals_as_the_step_shrinks(name, path, stop):
    """First order: twice the steps, half the error."""
    true = _marginal(path, stop)
    errors = []
    for steps in (200, 400):
        found = _carried(ALL[name], path, _levels(path, steps, stop))
        errors.append(max(abs(f - t) for f, t in zip(found, true, strict=True)))
    coarse, fine = errors
    assert fine < 0.02
    assert fine < 0.75 * coarse + 1e-9


@pytest.mark.parametrize("name", ALL)
def test_samples_have_the_moments_they_should(name):
    """100,000 samples through 20 steps: mean and deviation within five standard errors."""
    levels, samples = _levels(FLOW, 20), 100_000
    draw = torch.Generator().manual_seed(0)
    mean, deviation = _marginal(FLOW, 1.0)
    latents = mean + deviation * torch.randn(samples // 4, 1, 2, 2, generator=draw, dtype=torch.float64)
    for sigma, following in pairwise(levels):
        transition = ALL[name](_predict(FLOW, latents, sigma.expand(len(latents))), following.expand(len(latents)))
        latents = transition.sample(torch.randn(latents.shape, generator=draw, dtype=torch.float64))
    mean, deviation = _carried(ALL[name], FLOW, levels)
    assert abs(float(latents.mean()) - mean) < 5 * deviation / math.sqrt(samples)
    assert abs(float(latents.std()) - deviation) < 5 * deviation / math.sqrt(2 * samples)


def _somewhere(path: Path = FLOW) -> tuple[Prediction, torch.Tensor]:
    """A prediction for three samples at levels of their own, and lower levels to go to."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    return _predict(path, latents, sigma), torch.tensor([0.85, 0.3, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
def test_ancestral_without_noise_is_the_ode(path):
    prediction, following = _somewhere(path)
    still, ode = Ancestral(eta=0.0)(prediction, following), Ode()(prediction, following)
    torch.testing.assert_close(still.mean, ode.mean)
    assert torch.equal(still.std, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(ode.std, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("diffusion", ["square", "sigma", "constant"])
def test_an_sde_without_diffusion_is_the_ode(diffusion):
    prediction, following = _somewhere()
    still, ode = Sde(diffusion, 0.0)(prediction, following), Ode()(prediction, following)
    torch.testing.assert_close(still.mean, ode.mean)
    assert torch.equal(still.std, torch.zeros(3, dtype=torch.float64))


def test_an_sde_without_diffusion_is_the_ode_on_the_curved_path_too():
    """There Euler's step and DDIM's differ, but only to second order: half the step, a quarter of the difference."""
    prediction, _ = _somewhere(PRESERVING)
    gaps = []
    for step in (0.02, 0.01):
        following = prediction.sigma - step
        gaps.append(float((Sde(scale=0.0)(prediction, following).mean - Ode()(prediction, following).mean).abs().max()))
    assert gaps[0] < 1e-2
    assert gaps[1] / gaps[0] == pytest.approx(0.25, rel=0.1)


def test_the_ode_is_an_euler_step_along_the_velocity():
    prediction, following = _somewhere()
    step = spread(following - prediction.sigma, prediction.latents)
    torch.testing.assert_close(Ode()(prediction, following).mean, prediction.latents + step * prediction.velocity)


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
def test_ancestral_is_the_forward_processs_posterior(path):
    """Bayes by hand: given ``z0``, the earlier latent is the product of its marginal and the forward step's density."""
    z0, z = torch.tensor(0.8, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    for sigma, earlier in ((0.9, 0.85), (0.5, 0.3)):
        level, before = torch.tensor([sigma], dtype=torch.float64), torch.tensor([earlier], dtype=torch.float64)
        alpha, alpha_before = path.alpha(level), path.alpha(before)
        ratio = alpha / alpha_before
        forward = level**2 - ratio**2 * before**2
        precision = 1 / before**2 + ratio**2 / forward
        mean = (alpha_before * z0 / before**2 + ratio * z / forward) / precision
        latents = z.reshape(1, 1, 1, 1)
        clean, noise = z0.reshape(1, 1, 1, 1), ((z - alpha * z0) / level).reshape(1, 1, 1, 1)
        transition = Ancestral()(Prediction(path, latents, level, clean, noise), before)
        torch.testing.assert_close(transition.mean.flatten(), mean)
        torch.testing.assert_close(transition.std, precision.rsqrt())


def test_the_last_step_lands_on_the_clean_estimate():
    prediction, _ = _somewhere()
    zero = torch.zeros(3, dtype=torch.float64)
    for kernel in (Ode(), Ancestral(0.5), Ancestral()):
        transition = kernel(prediction, zero)
        torch.testing.assert_close(transition.mean, prediction.z0)
        assert torch.equal(transition.std, zero)


def test_sde_noise_is_the_diffusion_it_names():
    prediction, following = _somewhere()
    step = prediction.sigma - following
    for diffusion, g in (("square", prediction.sigma**2), ("sigma", prediction.sigma), ("constant", torch.ones(3))):
        torch.testing.assert_close(Sde(diffusion, 2.0)(prediction, following).std, (2 * g * step.sqrt()).double())


def test_log_prob_is_the_gaussians():
    draw = torch.Generator().manual_seed(0)
    mean, latents = (torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    truth = torch.distributions.Independent(torch.distributions.Normal(mean, std.reshape(3, 1, 1, 1)), 3)
    torch.testing.assert_close(Transition(mean, std).log_prob(latents), truth.log_prob(latents))


def test_log_prob_of_its_own_samples_is_minus_the_entropy():
    draw = torch.Generator().manual_seed(0)
    transition = Transition(torch.zeros(4000, 1, 2, 2), torch.full((4000,), 0.3))
    found = transition.log_prob(transition.sample(torch.randn(4000, 1, 2, 2, generator=draw)))
    entropy = 4 * (math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e))
    assert abs(float(found.mean()) + entropy) < 5 * math.sqrt(4 / 2 / 4000)


def test_repeat_keeps_a_samples_particles_in_a_row():
    transition = Transition(torch.arange(2.0).reshape(2, 1, 1, 1), torch.tensor([0.5, 0.7]))
    repeated = transition.repeat(3)
    assert repeated.mean.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert repeated.std.tolist() == pytest.approx([0.5] * 3 + [0.7] * 3)


def test_settings_outside_their_range():
    for make in (lambda: Ancestral(eta=1.5), lambda: Ancestral(eta=-0.1), lambda: Sde(scale=-1), lambda: Sde("cubic")):
        with pytest.raises(ValueError, match=r"eta|scale|diffusion"):
            make()
    assert {name: cls() for name, cls in KERNELS.items()} == {"ode": Ode(), "ancestral": Ancestral(), "sde": Sde()}
