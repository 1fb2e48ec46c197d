"""Interpolant conversion: one prediction on two paths, against published formulas and what they imply."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm.core import (
    Ancestral,
    Cps,
    FlowPath,
    Kernel,
    Ode,
    OnPath,
    Path,
    Prediction,
    Sde,
    VariancePreservingPath,
    spread,
)

FLOW, PRESERVING = FlowPath(), VariancePreservingPath()
BOTH = pytest.mark.parametrize(("own", "other"), [(FLOW, PRESERVING), (PRESERVING, FLOW)], ids=["flow-vp", "vp-flow"])
SDES = [Sde(), Sde("sigma"), Sde("constant"), Sde("grpo"), Sde("paper")]
SAME_EVERYWHERE: list[Kernel] = [Ode(), Ancestral(), Ancestral(0.4), Cps(), Cps(1.0)]


def _prediction(path: Path, levels: tuple[float, ...] = (0.9, 0.5, 0.2)) -> Prediction:
    """Any prediction is consistent with its latents; ``z0`` and ``eps`` are otherwise free."""
    draw = torch.Generator().manual_seed(0)
    sigma = torch.tensor(levels, dtype=torch.float64)
    z0, eps = (torch.randn(len(levels), 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    level = spread(sigma, z0)
    return Prediction(path, path.alpha(level) * z0 + level * eps, sigma, z0, eps)


LOWER = torch.tensor([0.85, 0.3, 0.0], dtype=torch.float64)


# -- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
def test_sigma_at_inverts_the_ratio(path):
    sigma = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(path.sigma_at(path.alpha(sigma) / sigma), sigma)
    ends = path.sigma_at(torch.tensor([0.0, math.inf]))
    assert ends.tolist() == [1.0, 0.0]


@BOTH
def test_conversion_keeps_the_ratio_and_scales_both_weights(own, other):
    sigma = torch.linspace(0, 1, 41, dtype=torch.float64)
    level, scale = own.convert(sigma, other)
    torch.testing.assert_close(other.alpha(level), scale * own.alpha(sigma))
    torch.testing.assert_close(level, scale * sigma)


@BOTH
def test_both_ends_are_the_same_on_every_path(own, other):
    level, scale = own.convert(torch.tensor([0.0, 1.0]), other)
    assert level.tolist() == [0.0, 1.0]
    assert scale.tolist() == [1.0, 1.0]


def test_levels_near_pure_noise_survive_single_precision():
    """``alpha`` at flow's 0.9999 is 1e-4: of a variance preserving level in float32 it is known to percents."""
    sigma = torch.tensor([0.9999], dtype=torch.float32)
    level, scale = FLOW.convert(sigma, PRESERVING)
    torch.testing.assert_close(PRESERVING.alpha(level) / scale, 1 - sigma.double(), rtol=1e-6, atol=0)


# -- predictions ------------------------------------------------------------------------------------------------------


@BOTH
def test_there_and_back_is_the_identity(own, other):
    prediction = _prediction(own)
    back = prediction.on(other).on(own)
    assert back.path is own
    for name in ("latents", "sigma", "z0", "eps"):
        torch.testing.assert_close(getattr(back, name), getattr(prediction, name))


@BOTH
def test_a_converted_prediction_is_consistent_with_its_latents(own, other):
    there = _prediction(own).on(other)
    level = spread(there.sigma, there.z0)
    torch.testing.assert_close(other.alpha(level) * there.z0 + level * there.eps, there.latents)


@BOTH
def test_the_score_is_that_of_scaled_latents(own, other):
    prediction = _prediction(own)
    _, scale = own.convert(prediction.sigma, other)
    torch.testing.assert_close(prediction.on(other).score, prediction.score / spread(scale, prediction.z0))


def test_the_velocity_is_that_of_the_published_conversion_to_a_variance_preserving_schedule():
    """Kim et al. (2025): CondOT's ``u_t`` on the schedule ``alpha = exp(-T/2)``, ``T = r^2 (B - b) / 2 + r b``, in its
    own time r: ``u_r(x) = (ds/s) x + dt s u_t(x / s, t)``."""
    prediction = _prediction(FLOW)
    t, u = prediction.sigma, prediction.eps - prediction.z0
    low, high = 0.1, 20.0
    # the time r of the same ratio: T = log(1 + ratio^-2)
    total = torch.log1p((t / (1 - t)) ** 2)
    r = (-low + (low**2 + 2 * (high - low) * total).sqrt()) / (high - low)
    alpha, sigma = (-total / 2).exp(), (-torch.expm1(-total)).sqrt()
    total_slope = r * (high - low) + low
    alpha_slope, sigma_slope = -alpha * total_slope / 2, alpha**2 * total_slope / (2 * sigma)
    s = sigma / t
    # CondOT: alpha_t = 1 - t with slope -1, sigma_t = t with slope 1
    dt = t**2 * (sigma * alpha_slope - alpha * sigma_slope) / (sigma**2 * (t * -1 - (1 - t)))
    ds = (t * sigma_slope - sigma * dt) / t**2
    wide, times, scales = (spread(factor, u) for factor in (ds / s, dt, s))
    published = wide * (scales * prediction.latents) + times * scales * u

    there = prediction.on(PRESERVING)
    torch.testing.assert_close(there.sigma, sigma)
    torch.testing.assert_close(there.latents, scales * prediction.latents)
    # ours is per unit of sigma, theirs per unit of r
    torch.testing.assert_close(there.velocity * spread(sigma_slope, u), published)


def test_the_velocity_of_a_preserving_backbone_is_flow_matchings():
    """The other way there is nothing to look up: on the flow path the velocity is ``eps - z0``."""
    prediction = _prediction(PRESERVING)
    torch.testing.assert_close(prediction.on(FLOW).velocity, prediction.eps - prediction.z0)


# -- kernels ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kernel", SAME_EVERYWHERE, ids=str)
def test_kernels_that_are_the_same_on_every_path(kernel, own, other):
    prediction = _prediction(own)
    here, there = kernel(prediction, LOWER), OnPath(kernel, other)(prediction, LOWER)
    torch.testing.assert_close(there.mean, here.mean)
    torch.testing.assert_close(there.std, here.std)


@pytest.mark.parametrize("path", [FLOW, PRESERVING], ids=lambda p: p.name)
@pytest.mark.parametrize("kernel", [*SAME_EVERYWHERE, *SDES], ids=str)
def test_the_same_path_changes_nothing(kernel, path):
    prediction = _prediction(path)
    here, there = kernel(prediction, LOWER), OnPath(kernel, type(path)())(prediction, LOWER)
    torch.testing.assert_close(there.mean, here.mean)
    torch.testing.assert_close(there.std, here.std)


def test_an_sde_on_the_preserving_path_by_hand():
    """From flow's sigma 0.5 to 0.3: ``s^2 = 1 / (alpha^2 + sigma^2)`` makes it variance preserving."""
    prediction = _prediction(FLOW, (0.5,))
    s, s_next = 1 / math.hypot(0.5, 0.5), 1 / math.hypot(0.7, 0.3)
    level, level_next = 0.5 * s, 0.3 * s_next
    g, step = 3 * level**2, level - level_next
    mean = 0.7 * s_next * prediction.z0 + level_next * prediction.eps - g**2 / 2 * prediction.eps / level * step
    transition = OnPath(Sde(), PRESERVING)(prediction, torch.tensor([0.3], dtype=torch.float64))
    torch.testing.assert_close(transition.mean, mean / s_next)
    assert float(transition.std) == pytest.approx(g * math.sqrt(step) / s_next)
    # That is another kernel than flow's own, of more noise here.
    usual = Sde()(prediction, torch.tensor([0.3], dtype=torch.float64))
    assert float(transition.std) > 1.5 * float(usual.std)


@BOTH
@pytest.mark.parametrize("kernel", [*SAME_EVERYWHERE, *SDES], ids=str)
def test_both_ends_are_finite(kernel, own, other):
    """From pure noise, down to the clean latent, and both at once."""
    prediction = _prediction(own, (1.0, 0.3, 1.0))
    transition = OnPath(kernel, other)(prediction, torch.tensor([0.9, 0.0, 0.0], dtype=torch.float64))
    assert bool(transition.mean.isfinite().all())
    assert bool(transition.std.isfinite().all())


@BOTH
def test_the_last_step_of_the_ode_is_the_clean_estimate_exactly(own, other):
    prediction = _prediction(own, (1.0, 0.3, 0.01))
    transition = OnPath(Ode(), other)(prediction, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(transition.mean, prediction.z0)


@BOTH
@pytest.mark.parametrize("kernel", [Ode(), *SDES], ids=str)
def test_single_precision_goes_in_and_out(kernel, own, other):
    """And is as good as double, also a little below pure noise."""
    double = _prediction(own, (0.9999, 0.5, 0.2))
    single = Prediction(own, double.latents.float(), double.sigma.float(), double.z0.float(), double.eps.float())
    found, true = OnPath(kernel, other)(single, LOWER.float()), OnPath(kernel, other)(double, LOWER)
    assert found.mean.dtype is found.std.dtype is torch.float32
    torch.testing.assert_close(found.mean, true.mean.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.std, true.std.float(), rtol=1e-3, atol=1e-5)


def test_gradients_pass_through_the_conversion():
    """To the latents, through a prediction that depends on them."""
    latents = _prediction(FLOW).latents.requires_grad_()
    sigma = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)

    def step(kernel: Kernel) -> torch.Tensor:
        mean = kernel(FLOW.interpret("velocity", latents.sin(), latents, sigma), LOWER).mean
        (gradient,) = torch.autograd.grad(mean.square().sum(), latents)
        return gradient

    torch.testing.assert_close(step(OnPath(Ode(), PRESERVING)), step(Ode()))
