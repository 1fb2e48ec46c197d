"""Transition kernels in a Gaussian world, where prediction, marginals and densities are known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from stitchvm.core import (
    KERNELS,
    Ancestral,
    ConfigError,
    Cps,
    FlowPath,
    Kernel,
    Ode,
    OnPath,
    Path,
    Prediction,
    Sde,
    Transition,
    VariancePreservingPath,
    spread,
)

MEAN, DEVIATION = 0.4, 0.7
FLOW, PRESERVING = FlowPath(), VariancePreservingPath()
OTHER = {"flow": PRESERVING, "variance-preserving": FLOW}

ALL: dict[str, Kernel] = {
    "ode": Ode(),
    "ancestral-0": Ancestral(eta=0.0),
    "ancestral-half": Ancestral(eta=0.5),
    "ancestral": Ancestral(),
    "sde": Sde(),
    "sde-sigma": Sde("sigma", 1.5),
    "sde-constant": Sde("constant", 0.8),
    "sde-grpo": Sde("grpo"),
    "sde-paper": Sde("paper"),
}
"""Kernels that keep the marginals."""
START = {"sde-grpo": 0.95}
"""Where sampling starts, if not at pure noise: Flow-GRPO's infinite ``g`` there is a test of its own."""
NOISY = {name: kernel for name, kernel in ALL.items() if name not in ("ode", "ancestral-0")} | {"cps": Cps()}


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


def _levels(steps: int, stop: float = 0.0, start: float = 1.0) -> torch.Tensor:
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def _carried(kernel: Kernel, path: Path, levels: torch.Tensor) -> tuple[float, float]:
    """Mean and deviation after all steps, without sampling: with an exact prediction every step is affine. All steps'
    maps are read in one call, off two probes each."""
    steps = len(levels) - 1
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(steps).reshape(-1, 1, 1, 1)
    transition = kernel(_predict(path, probes, levels[:-1].repeat(2)), levels[1:].repeat(2))
    offsets, ahead = transition.mean.flatten().unflatten(0, (2, steps))
    mean, deviation = _marginal(path, float(levels[0]))
    for offset, slope, noise in torch.stack([offsets, ahead - offsets, transition.std[:steps]], 1).tolist():
        mean, deviation = offset + slope * mean, math.hypot(slope * deviation, noise)
    return mean, deviation


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("converted", [False, True], ids=["own-path", "other-path"])
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_every_kernel_keeps_the_marginals_as_the_step_shrinks(name, path, converted, stop):
    """First order: twice the steps, half the error."""
    kernel = OnPath(ALL[name], OTHER[path.name]) if converted else ALL[name]
    true = _marginal(path, stop)
    errors = []
    for steps in (200, 400):
        found = _carried(kernel, path, _levels(steps, stop, START.get(name, 1.0)))
        errors.append(max(abs(f - t) for f, t in zip(found, true, strict=True)))
    coarse, fine = errors
    assert fine < 0.02
    assert fine < 0.75 * coarse + 1e-9


def test_grpo_forgets_pure_noises_infinite_diffusion_slowly():
    """Near pure noise ``g^2 = a^2 / (1 - t)``: the variance's surplus of the first step shrinks by ``1 - a^2 / k`` at
    step k, hence as ``steps^(-a^2)``: twice the steps, ``2^(-0.49)`` of the error."""
    true = _marginal(FLOW, 0.3)[1]
    coarse, fine = (_carried(Sde("grpo"), FLOW, _levels(steps, 0.3))[1] - true for steps in (400, 800))
    assert 0 < fine < 0.002
    assert fine / coarse == pytest.approx(2**-0.49, rel=0.03)


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize("noise_level", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_cps_narrows_samples_to_a_known_variance(path, noise_level, stop):
    """Not the marginal's: as the step shrinks, to the fixed point of ``x' = alpha z0(x) + sigma cos eps(x) + sigma sin
    noise``, a linear recursion in a Gaussian world. The mean is right."""
    mean, deviation = _marginal(path, stop)
    kept = math.cos(noise_level * math.pi / 2)
    limit = deviation * math.sqrt((1 + kept) / (2 - (1 - kept) * stop**2 / deviation**2))
    (mean_coarse, coarse), (mean_fine, fine) = (
        _carried(Cps(noise_level), path, _levels(steps, stop)) for steps in (200, 800)
    )
    assert limit < deviation - 0.02
    assert abs(fine - limit) < 0.003
    assert abs(fine - limit) < 0.5 * abs(coarse - limit)
    assert max(abs(mean_coarse - mean), abs(mean_fine - mean)) < 1e-9


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 3])
def test_cps_preserves_the_coefficients_where_z0_is_certain(path, steps):
    """A prior of one point: the exact marginal at any number of steps."""
    z0, stop = 0.4, 0.3
    deviation, levels = 1.0, _levels(steps, stop)
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    mean = 0.0
    for sigma, following in pairwise(levels):
        eps = (probes - path.alpha(sigma) * z0) / sigma
        prediction = Prediction(path, probes, sigma.expand(2), torch.full_like(probes, z0), eps)
        transition = Cps()(prediction, following.expand(2))
        offset, ahead = transition.mean.flatten().tolist()
        mean = offset + (ahead - offset) * mean
        deviation = math.hypot((ahead - offset) * deviation, float(transition.std[0]))
    assert mean == pytest.approx(float(path.alpha(levels[-1])) * z0)
    assert deviation == pytest.approx(stop)


@pytest.mark.parametrize("name", ALL)
def test_samples_have_the_moments_they_should(name):
    """100,000 samples through 20 steps: mean and deviation within five standard errors."""
    levels, samples = _levels(20), 100_000
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


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "still", [*(Sde(name, 0.0) for name in ("square", "sigma", "constant", "grpo")), Cps(0.0)], ids=str
)
def test_without_noise_every_kernel_is_the_ode(still, path):
    prediction, following = _somewhere(path)
    transition, ode = still(prediction, following), Ode()(prediction, following)
    torch.testing.assert_close(transition.mean, ode.mean)
    assert torch.equal(transition.std, torch.zeros(3, dtype=torch.float64))


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
    for kernel in (Ode(), Ancestral(0.5), Ancestral(), Cps(), Cps(1.0)):
        transition = kernel(prediction, zero)
        torch.testing.assert_close(transition.mean, prediction.z0)
        assert torch.equal(transition.std, zero)


def test_sde_noise_is_the_diffusion_it_names():
    prediction, following = _somewhere()
    step = prediction.sigma - following
    for diffusion, g in (("square", prediction.sigma**2), ("sigma", prediction.sigma), ("constant", torch.ones(3))):
        torch.testing.assert_close(Sde(diffusion, 2.0)(prediction, following).std, (2 * g * step.sqrt()).double())


@pytest.mark.parametrize(("diffusion", "scale"), [("square", 3.0), ("sigma", 1.0), ("constant", 1.0), ("grpo", 0.7)])
def test_each_diffusion_has_a_scale_of_its_own(diffusion, scale):
    prediction, following = _somewhere()
    usual, same = Sde(diffusion)(prediction, following), Sde(diffusion, scale)(prediction, following)
    assert torch.equal(usual.mean, same.mean)
    assert torch.equal(usual.std, same.std)


def _velocity(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow latents and what a network may say there."""
    latents, velocity = (torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return latents, velocity


@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_grpo_is_flow_grpos_step(noise_level):
    """Its published mean and deviation; at sigma 1 the denominator is that of the next level."""
    x, u = _velocity(torch.Generator().manual_seed(1))
    sigma, following = (torch.tensor(level, dtype=torch.float64) for level in ([1.0, 0.5, 0.2], [0.9, 0.3, 0.0]))
    room = 1 - torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    s, dt = noise_level * (sigma / room).sqrt(), following - sigma
    wide, t, back = (spread(level, x) for level in (s, sigma, dt))
    mean = x * (1 + wide**2 / (2 * t) * back) + u * (1 + wide**2 * (1 - t) / (2 * t)) * back
    transition = Sde("grpo", noise_level)(FLOW.interpret("velocity", u, x, sigma), following)
    torch.testing.assert_close(transition.mean, mean)
    torch.testing.assert_close(transition.std, s * (-dt).sqrt())


def test_paper_is_the_appendixs_diffusion():
    """``nu^2 = 4 t / (1 - t)`` in ``dz = (u - nu^2 score / 2) dt + nu dW``, t falling."""
    x, u = _velocity(torch.Generator().manual_seed(2))
    sigma, following = (torch.tensor(level, dtype=torch.float64) for level in ([0.9, 0.5, 0.2], [0.85, 0.3, 0.0]))
    nu2, step = 4 * sigma / (1 - sigma), sigma - following
    t = spread(sigma, x)
    score = -((1 - t) * u + x) / t
    transition = Sde("paper")(FLOW.interpret("velocity", u, x, sigma), following)
    torch.testing.assert_close(transition.mean, x - (u - spread(nu2, x) * score / 2) * spread(step, x))
    torch.testing.assert_close(transition.std, (nu2 * step).sqrt())


@pytest.mark.parametrize("noise_level", [0.4, 0.8])
def test_cps_is_flow_grpos_variant(noise_level):
    x, u = _velocity(torch.Generator().manual_seed(3))
    sigma, following = (torch.tensor(level, dtype=torch.float64) for level in ([1.0, 0.5, 0.2], [0.9, 0.3, 0.0]))
    std = following * math.sin(noise_level * math.pi / 2)
    t, after, wide = (spread(level, x) for level in (sigma, following, std))
    mean = (x - t * u) * (1 - after) + (x + (1 - t) * u) * (after**2 - wide**2).sqrt()
    transition = Cps(noise_level)(FLOW.interpret("velocity", u, x, sigma), following)
    torch.testing.assert_close(transition.mean, mean)
    torch.testing.assert_close(transition.std, std)


def test_cps_at_its_most_renoises():
    """diffusers' ``stochastic_sampling``: ``x' = (1 - sigma') z0 + sigma' noise``."""
    draw = torch.Generator().manual_seed(4)
    x, u = _velocity(draw)
    noise = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    sigma, following = (torch.tensor(level, dtype=torch.float64) for level in ([1.0, 0.5, 0.2], [0.9, 0.3, 0.0]))
    t, after = spread(sigma, x), spread(following, x)
    found = Cps(1.0)(FLOW.interpret("velocity", u, x, sigma), following).sample(noise)
    torch.testing.assert_close(found, (1 - after) * (x - t * u) + after * noise)


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize("name", NOISY)
def test_log_prob_of_every_kernel_is_the_gaussians(name, path):
    prediction, _ = _somewhere(path)
    transition = NOISY[name](prediction, prediction.sigma - 0.05)
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scale = spread(transition.std, latents)
    truth = torch.distributions.Independent(torch.distributions.Normal(transition.mean, scale), 3)
    torch.testing.assert_close(transition.log_prob(latents), truth.log_prob(latents))


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
    for make in (
        lambda: Ancestral(eta=1.5), lambda: Ancestral(eta=-0.1), lambda: Sde(scale=-1), lambda: Sde("cubic"),
        lambda: Cps(noise_level=1.1), lambda: Cps(noise_level=-0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"eta|scale|diffusion|noise_level"):
            make()


def test_the_papers_diffusion_has_no_scale():
    with pytest.raises(ConfigError, match=r"'paper' has no scale, got 1; 'grpo'"):
        Sde("paper", 1.0)


def test_every_kernel_has_a_name_and_defaults():
    usual = {"ode": Ode(), "ancestral": Ancestral(1.0), "cps": Cps(0.8), "sde": Sde("square")}
    assert {name: cls() for name, cls in KERNELS.items()} == usual
