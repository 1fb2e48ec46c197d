"""Noise paths: the identities that tie clean latent, noise, velocity and score together."""

from __future__ import annotations

import pytest
import torch

from stitchvm.core import (
    ConfigError,
    FlowPath,
    NoiseLevelError,
    Path,
    SliceError,
    VariancePreservingPath,
    as_sigma,
    spread,
)

PATHS = {"flow": FlowPath(), "variance-preserving": VariancePreservingPath()}
KINDS = [
    ("flow", "velocity"),
    ("flow", "epsilon"),
    ("variance-preserving", "epsilon"),
    ("variance-preserving", "v"),
]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    return PATHS[request.param]


def _latents(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean latents, noise, and three noise levels inside (0, 1)."""
    draw = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(3, 2, 4, 5, generator=draw, dtype=dtype) for _ in range(2))
    return z0, eps, torch.tensor([0.1, 0.5, 0.9], dtype=dtype)


def test_ends_of_the_path(path):
    z0, eps, _ = _latents(torch.float32)
    assert torch.equal(path.add_noise(z0, eps, 0), z0)
    assert torch.equal(path.add_noise(z0, eps, 1), eps)


def test_weights_are_the_declared_law():
    level = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(PATHS["flow"].alpha(level) + level, torch.ones_like(level))
    preserving = PATHS["variance-preserving"].alpha(level)
    torch.testing.assert_close(preserving.square() + level.square(), torch.ones_like(level))


def test_each_sample_at_its_own_level(path):
    z0, eps, level = _latents(torch.float32)
    together = path.add_noise(z0, eps, level)
    for row in range(3):
        alone = path.add_noise(z0[row : row + 1], eps[row : row + 1], float(level[row]))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_slope_is_the_derivative(path):
    level = torch.linspace(0.05, 0.95, 10, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(path.alpha(level).sum(), level)
    torch.testing.assert_close(path.alpha_slope(level), slope)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_perfect_prediction_gives_latent_and_noise_back(name, kind):
    path = PATHS[name]
    z0, eps, level = _latents()
    sigma = spread(level, z0)
    alpha = path.alpha(sigma)
    latents = alpha * z0 + sigma * eps
    output = {"velocity": eps - z0, "epsilon": eps, "v": alpha * eps - sigma * z0}[kind]
    prediction = path.interpret(kind, output, latents, level)
    torch.testing.assert_close(prediction.z0, z0)
    torch.testing.assert_close(prediction.eps, eps)
    assert prediction.latents is latents


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_any_prediction_is_consistent_with_its_latents(name, kind):
    """Whatever the network says, ``alpha z0 + sigma eps`` is where it was asked."""
    path = PATHS[name]
    latents, output, level = _latents()
    prediction = path.interpret(kind, output, latents, level)
    sigma = spread(level, latents)
    torch.testing.assert_close(path.alpha(sigma) * prediction.z0 + sigma * prediction.eps, latents)


@pytest.mark.parametrize(("name", "kind"), [("flow", "v"), ("variance-preserving", "velocity"), ("flow", "noise")])
def test_a_kind_without_a_formula_on_this_path(name, kind):
    latents, output, level = _latents()
    with pytest.raises(ConfigError, match=f"{kind!r} prediction is not defined on the {name} path"):
        PATHS[name].interpret(kind, output, latents, level)


def test_velocity_is_the_derivative_along_the_path(path):
    z0, eps, level = _latents()
    step = 1e-6

    def at(shift: float) -> torch.Tensor:
        sigma = spread(level + shift, z0)
        return path.alpha(sigma) * z0 + sigma * eps

    prediction = path.interpret("epsilon", eps, at(0), level)
    torch.testing.assert_close(prediction.velocity, (at(step) - at(-step)) / (2 * step), rtol=1e-7, atol=1e-7)


def test_flow_velocity_is_what_the_network_said():
    latents, output, level = _latents()
    torch.testing.assert_close(PATHS["flow"].interpret("velocity", output, latents, level).velocity, output)


def test_score_is_the_gradient_of_the_log_density(path):
    """Under the prior ``N(m, s^2)`` the marginal is Gaussian; the posterior mean must give its score (Tweedie)."""
    latents, _, level = _latents()
    mean, deviation = 0.3, 0.7
    sigma = spread(level, latents)
    alpha = path.alpha(sigma)
    variance = alpha**2 * deviation**2 + sigma**2
    z = latents.clone().requires_grad_()
    density = torch.distributions.Normal(alpha * mean, variance.sqrt()).log_prob(z).sum()
    (gradient,) = torch.autograd.grad(density, z)
    eps = sigma * (latents - alpha * mean) / variance
    torch.testing.assert_close(path.interpret("epsilon", eps, latents, level).score, gradient)


def test_index_keeps_samples_together(path):
    latents, output, level = _latents()
    prediction = path.interpret("epsilon", output, latents, level)
    rows = torch.tensor([2, 0, 0])
    chosen = prediction.index(rows)
    again = path.interpret("epsilon", output[rows], latents[rows], level[rows])
    for name in ("latents", "sigma", "z0", "eps"):
        assert torch.equal(getattr(chosen, name), getattr(again, name)), name


@pytest.mark.parametrize("sigma", [-0.1, 1.001, 500, float("nan"), torch.tensor([0.1, 0.2, 1.2])])
def test_a_level_outside_zero_to_one(path, sigma):
    z0, eps, _ = _latents()
    with pytest.raises(NoiseLevelError, match="0 clean, 1 pure noise"):
        path.add_noise(z0, eps, sigma)


@pytest.mark.parametrize("sigma", [torch.zeros(2), torch.zeros(3, 1)])
def test_levels_of_the_wrong_shape(sigma):
    with pytest.raises(SliceError, match="expected one number or 3"):
        as_sigma(sigma, torch.zeros(3, 2, 4, 5))


def test_levels_become_one_a_sample():
    latents = torch.zeros(3, 2, 4, 5, dtype=torch.float16)
    for sigma in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((3,), 0.25)):
        level = as_sigma(sigma, latents)
        assert level.dtype == torch.float32
        assert torch.equal(level, torch.full((3,), 0.25))
