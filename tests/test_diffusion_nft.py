"""DiffusionNFT against independent formulas: noise put on an anchor, the loss, and the optimum it leads to."""

from __future__ import annotations

import math

import attrs
import pytest
import torch

from stitchvm import core
from stitchvm.core import Prediction
from stitchvm.core.paths import FlowPath, VariancePreservingPath, spread
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft, nft_loss
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo
from training_worlds import STEPS, UPDATE, Brightness, assert_same, drawn, gradients, problem, rows_of

PATHS = {"flow": FlowPath(), "vp": VariancePreservingPath()}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_noising_twice_is_noising_once(path):
    tau, sigma = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    weight, std = path.transfer(tau, sigma)
    torch.testing.assert_close(weight * path.alpha(tau), path.alpha(sigma))
    torch.testing.assert_close((weight * tau).square() + std.square(), sigma.square())


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_exact_conditional_velocity_leads_back_to_the_anchor(path, tau):
    """The velocity of ``z_t = a(t) z_tau + s(t) eps`` by differences in t, read as any network's output is."""
    anchor, noise = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4, seed=1)
    level, low = torch.full((3,), 0.75, dtype=torch.float64), torch.full((3,), tau, dtype=torch.float64)

    def at(t: torch.Tensor) -> torch.Tensor:
        weight, std = path.transfer(low, t)
        return spread(weight, anchor) * anchor + spread(std, anchor) * noise

    latents, step = at(level), 1e-6
    velocity = (at(level + step) - at(level - step)) / (2 * step)
    # dz/dsigma = alpha' z0 + eps and z = alpha z0 + sigma eps, solved for z0 and eps
    alpha, slope = (spread(one, anchor) for one in (path.alpha(level), path.alpha_slope(level)))
    t = spread(level, anchor)
    z0 = (latents - t * velocity) / (alpha - t * slope)
    prediction = Prediction(path, latents, level, z0, velocity - slope * z0)
    torch.testing.assert_close(prediction.anchor(low), anchor, rtol=1e-6, atol=1e-7)


def test_the_anchor_on_the_flow_path_is_the_published_formula():
    tau, t = 0.35, 0.8
    latents, velocity = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1)
    level = torch.full((2,), t, dtype=torch.float64)
    prediction = FlowPath().interpret("velocity", velocity, latents, level)
    a = (1 - t) / (1 - tau)
    expected = (1 - tau) / t * ((t + a * tau**2 / (1 - tau)) * latents - (t**2 - a**2 * tau**2) * velocity)
    torch.testing.assert_close(prediction.anchor(torch.full((2,), tau, dtype=torch.float64)), expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_distance_is_that_of_the_velocities(path):
    latents, one, two = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1), drawn(2, 3, 4, 4, seed=2)
    level, kind = torch.tensor([0.4, 0.9], dtype=torch.float64), "velocity" if path.name == "flow" else "v"
    ours, theirs = (path.interpret(kind, output, latents, level) for output in (one, two))
    torch.testing.assert_close(ours.distance(theirs), (one - two).square().flatten(1).mean(1))


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_at_tau_0_is_the_released_loss_with_its_gradient(beta):
    latents, clean, t = drawn(4, 3, 4, 4), drawn(4, 3, 4, 4, seed=1), torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
    v_old, r = drawn(4, 3, 4, 4, seed=2), torch.tensor([0.0, 0.3, 0.8, 1.0]).double()
    v = drawn(4, 3, 4, 4, seed=3).requires_grad_()
    path, settings = FlowPath(), DiffusionNft(mix_beta=beta)
    ours, old = (path.interpret("velocity", one, latents, t) for one in (v, v_old))
    found = nft_loss(settings, ours, old, clean, torch.zeros_like(t), r)

    level = t[:, None, None, None]
    total = []
    for velocity, weight in ((beta * v + (1 - beta) * v_old, r), ((1 + beta) * v_old - beta * v, 1 - r)):
        error = latents - level * velocity - clean
        norm = error.abs().mean((1, 2, 3), keepdim=True).detach().clip(min=1e-5)
        total.append(weight * (error**2 / norm).mean((1, 2, 3)))
    expected = (total[0] + total[1]) / beta * 5
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    (gradient,), (theirs,) = (torch.autograd.grad(one.sum(), v, retain_graph=True) for one in (found, expected))
    torch.testing.assert_close(gradient, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_nft_of_velocities_is_the_papers_regression(tau):
    """``r |u+ - u|^2 + (1 - r) |u- - u|^2`` with the conditional velocity of the anchor's forward process."""
    path, t = FlowPath(), torch.tensor([0.5, 0.9]).double()
    anchor, noise, low = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1), torch.full((2,), tau, dtype=torch.float64)
    weight, std = path.transfer(low, t)
    latents = spread(weight, anchor) * anchor + spread(std, anchor) * noise
    v, v_old, r, beta = drawn(2, 3, 4, 4, seed=2), drawn(2, 3, 4, 4, seed=3), torch.tensor([0.2, 0.9]).double(), 0.5
    ours, old = (path.interpret("velocity", one, latents, t) for one in (v, v_old))
    settings = DiffusionNft(mix_beta=beta, regression="velocity")
    found = nft_loss(settings, ours, old, anchor, low, r)
    slope = (t + weight * low**2 / (1 - low)) / std  # d std / dt
    target = -anchor / (1 - tau) + spread(slope, noise) * noise
    good, bad = beta * v + (1 - beta) * v_old - target, (1 + beta) * v_old - beta * v - target
    expected = r * good.square().mean((1, 2, 3)) + (1 - r) * bad.square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected * 5 / beta, rtol=1e-8, atol=0)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_the_optimum_of_nft_is_the_improved_policy_in_a_gaussian_world(tau):
    """For Gaussian data and ``r = 1/2 + c z_tau`` the improved policy expects ``(2/b) c Var(z_tau | z_t)`` more.

    The loss is quadratic in the policy's shift, so that its slope is zero there and there alone. Tolerance: four
    standard errors of the slope over the samples.
    """
    path, count, t, spread_of, c, beta = FlowPath(), 40_000, 0.7, 0.8, 0.02, 0.5
    low, level = (torch.full((count,), one, dtype=torch.float64) for one in (tau, t))
    deviation = math.sqrt((1 - tau) ** 2 * spread_of**2 + tau**2)  # of z_tau
    anchor = deviation * drawn(count, 1, 1, 1)
    weight, std = path.transfer(low, level)
    latents = spread(weight, anchor) * anchor + spread(std, anchor) * drawn(count, 1, 1, 1, seed=1)
    a, s = float(weight[0]), float(std[0])
    gain = a * deviation**2 / (a**2 * deviation**2 + s**2)
    left = deviation**2 * s**2 / (a**2 * deviation**2 + s**2)  # Var(z_tau | z_t)
    optimality = 0.5 + c * anchor.flatten()

    def expecting(shift: torch.Tensor) -> Prediction:
        """The exact posterior mean of the anchor, shifted, as a velocity."""
        path_factor = (1 - tau) / t * (t**2 - a**2 * tau**2)
        velocity = ((1 - tau) / t * (t + a * tau**2 / (1 - tau)) * latents - (gain * latents + shift)) / path_factor
        return path.interpret("velocity", velocity, latents, level)

    settings = DiffusionNft(mix_beta=beta, regression="velocity", advantage_clip=1.0)

    def slopes(shift: float) -> torch.Tensor:
        moved = torch.full((count, 1, 1, 1), shift, dtype=torch.float64, requires_grad=True)
        losses = nft_loss(settings, expecting(moved), expecting(torch.zeros(1).double()), anchor, low, optimality)
        return torch.autograd.grad(losses.sum(), moved)[0].flatten()

    best = 2 / beta * c * left
    at_best = slopes(best)
    error = float(at_best.std()) / math.sqrt(count)
    assert abs(float(at_best.mean())) < 4 * error
    assert float(slopes(0.0).mean()) < -8 * error  # the old policy is not it
    assert float(slopes(2 * best).mean()) > 8 * error


def test_nft_keeps_a_group_of_equal_values_at_one_half_and_clips_what_stands_out():
    task, settings = problem(), DiffusionNft(samples_per_prompt=4, advantage_clip=1.0)
    assert task.advantages(torch.full((8,), 0.3), 4).abs().max() < 1e-6
    values = torch.tensor([0.0, 0.0, 0.0, 8.0, 1.0, 1.0, 1.0, 1.0])
    found = task.advantages(values, 4)
    whole = values.std(correction=0)
    torch.testing.assert_close(found[3], (8 - 2) / (whole + 1e-4))
    assert float(found[4:].abs().max()) == 0
    own = task.advantages(values, 4, group_std=True)
    torch.testing.assert_close(own[3], (8 - 2) / (values[:4].std(correction=0) + 1e-4))
    rows = rows_of(settings.collect(attrs.evolve(task, estimator=Brightness()), UPDATE))
    assert 0 <= float(rows["optimality"].min()) < 0.5 < float(rows["optimality"].max()) <= 1


def test_a_sample_without_a_value_is_dropped_and_a_group_without_any_is_an_error():
    task = problem()
    with pytest.warns(RuntimeWarning, match="1 of 4 samples have no finite value"):
        found = task.advantages(torch.tensor([1.0, math.nan, 3.0, 5.0]), 2)
    assert found.isnan().tolist() == [False, True, False, False]
    with pytest.raises(core.NonFiniteError, match="no sample of some prompt"):
        task.advantages(torch.tensor([math.nan, math.nan, 3.0, 5.0]), 2)


@pytest.mark.parametrize("stop", [None, (3, 3)])
def test_nft_regresses_from_where_the_old_policys_rollout_stopped(stop):
    task = problem(moved=0.05)  # the old policy is the one before it moved
    settings = DiffusionNft(samples_per_prompt=2, stop=stop)
    steps = STEPS if stop is None else 3
    found = settings.collect(task, UPDATE)
    owners = torch.tensor([0, 0, 1, 1])
    noise = task.noise(task.seeds(UPDATE, 2, 0))
    expected = task.rollout(task.old.backbone, noise, owners, steps)
    assert torch.equal(found.samples["anchor"], expected)
    assert not torch.allclose(task.rollout(task.policy.backbone, noise, owners, steps), expected)
    assert torch.equal(found.samples["tau"], task.sigmas[steps].expand(4))
    assert sorted(set(found.rows["sigma"].tolist())) == sorted(task.sigmas[:steps].tolist())
    fewer = attrs.evolve(settings, levels=2).collect(task, UPDATE)
    assert len(fewer) == 8 and set(fewer.rows["sigma"].tolist()) <= set(task.sigmas[:steps].tolist())


def test_what_is_better_than_its_group_is_more_than_half_good():
    """``r = 1/2 + clip(A) / (2 clip)``, of advantages written out: the sign is what a training climbs by."""
    task, settings = problem(moved=0.05), DiffusionNft(samples_per_prompt=4, advantage_clip=1.2)
    found = settings.collect(task, UPDATE).samples
    values = torch.tanh(found["anchor"].flatten(1).mean(1)).view(2, 4)
    deviation = (values - values.mean()).square().mean().sqrt() + 1e-4
    expected = ((values - values.mean(1, keepdim=True)) / deviation).clamp(-1.2, 1.2) / 2.4 + 0.5
    torch.testing.assert_close(found["optimality"], expected.flatten())
    best = values.argmax(1)
    assert all(float(row[n]) > 0.5 for row, n in zip(found["optimality"].view(2, 4), best, strict=True))


def test_nfts_loss_is_the_released_one_of_the_two_networks_with_its_gradient():
    """The policy's output and the old policy's at the same noised samples; the old one is held still."""
    task, settings = problem(moved=0.05), DiffusionNft(samples_per_prompt=2, kl_weight=0.0, mix_beta=0.4)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, _ = settings.loss(task, rows)
    clean, t, r = rows["anchor"], spread(rows["sigma"], rows["anchor"]), rows["optimality"]
    latents, condition = (1 - t) * clean + t * task.noise(rows["seed"]), task.conditions.index(rows.owners)
    v, v_old = (net.upstream(core.NoisyLatent(latents, rows["sigma"]), condition)
                for net in (task.policy.backbone, task.old.backbone))  # fmt: skip
    assert not torch.allclose(v, v_old, atol=1e-3)
    v_old, expected = v_old.detach(), 0.0
    for velocity, weight in ((0.4 * v + 0.6 * v_old, r), (1.4 * v_old - 0.4 * v, 1 - r)):
        error = latents - t * velocity - clean
        norm = error.abs().mean((1, 2, 3), keepdim=True).detach().clip(min=1e-5)
        expected = expected + weight * (error**2 / norm).mean((1, 2, 3)) * 5 / 0.4
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert_same(gradients(task, losses), gradients(task, expected), 1e-3)


def test_a_sample_is_noised_again_by_noise_that_is_not_what_it_began_as():
    task, settings = problem(), DiffusionNft(samples_per_prompt=2)
    rows = rows_of(settings.collect(task, UPDATE))
    began = {int(seed) for seed in task.seeds(UPDATE, 2, 0)}
    again = [int(seed) for seed in rows["seed"]]
    assert len(set(again)) == len(again) and not began & set(again)


@pytest.mark.parametrize(("error", "expected"), [(1e-2, 1e-2), (1e-6, 1e-12 / 1e-5)])
def test_a_self_normalised_error_is_its_own_size_until_it_is_nearly_none(error, expected):
    """Both mixtures miss the anchor by ``error`` everywhere: ``5 e^2 / max(|e|, 1e-5)``."""
    path, level = FlowPath(), torch.tensor([0.5], dtype=torch.float64)
    latents = drawn(1, 3, 4, 4)
    prediction = path.interpret("velocity", drawn(1, 3, 4, 4, seed=1), latents, level)
    anchor, tau = prediction.anchor(torch.zeros_like(level)) - error, torch.zeros_like(level)
    found = nft_loss(DiffusionNft(), prediction, prediction, anchor, tau, torch.tensor([0.3], dtype=torch.float64))
    torch.testing.assert_close(found, 5 * torch.tensor([expected], dtype=torch.float64))


class Level:
    """The noise level that it is asked about."""

    def __call__(self, latents, sigma, context, prediction=None):
        return sigma.expand(len(latents)).float()


@pytest.mark.parametrize("method", [DiffusionNft, DiffusionDpo, FlowGrpo])
def test_a_value_is_asked_about_the_level_where_the_rollout_stopped(method):
    task = problem(estimator=Level())
    for stop in (2, 4):
        found = method(samples_per_prompt=2, stop=(stop, stop)).collect(task, UPDATE)
        assert found.figures["value"] == pytest.approx(float(task.sigmas[stop]))


def test_nfts_gradient_reaches_the_policy_alone_and_grows_away_from_the_reference():
    task, settings = problem(moved=0.05), DiffusionNft(samples_per_prompt=2, kl_weight=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    plain, _ = settings.loss(task, rows)
    held, _ = attrs.evolve(settings, kl_weight=2.0).loss(task, rows)
    weight, std = FlowPath().transfer(rows["tau"], rows["sigma"])
    latents = spread(weight, rows["anchor"]) * rows["anchor"] + spread(std, rows["anchor"]) * task.noise(rows["seed"])
    condition = task.conditions.index(rows.owners)
    ours, frozen = (net.upstream(core.NoisyLatent(latents, rows["sigma"]), condition)
                    for net in (task.policy.backbone, task.reference))  # fmt: skip
    torch.testing.assert_close(held - plain, 2 * (ours - frozen).square().flatten(1).mean(1), rtol=1e-3, atol=1e-5)
    assert_same(gradients(task, held - plain), gradients(task, 2 * (ours - frozen).square().flatten(1).mean(1)), 1e-3)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in task.reference.net.parameters())


def test_the_old_policy_follows_as_its_decay_says():
    task, settings = problem(moved=0.1), DiffusionNft(old_decay_rate=0.25, old_decay=0.5)
    name = next(iter(task.policy.parameters))
    new, old = task.policy.parameters[name], task.old.parameters[name].clone()
    settings.updated(task, 0)
    torch.testing.assert_close(task.old.parameters[name], 0.25 * old + 0.75 * new)
    old = task.old.parameters[name].clone()
    settings.updated(task, 9)  # at most 0.5
    torch.testing.assert_close(task.old.parameters[name], 0.5 * old + 0.5 * new)
    attrs.evolve(settings, old_decay_start=100).updated(task, 0)
    torch.testing.assert_close(task.old.parameters[name], new.detach())
