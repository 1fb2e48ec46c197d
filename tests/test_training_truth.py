"""Training methods against independent formulas: the loss, the gradient, and the optimum they lead to."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from torch.distributions import Normal

import families
from stitchvm import core
from stitchvm.core import Ode, Prediction, Sde, TrainProblem, Tweedie
from stitchvm.core.paths import FlowPath, VariancePreservingPath, spread
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft, nft_loss
from stitchvm.plugins.aligners.draft import Draft
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo, clipped_loss
from training_worlds import STEPS, UPDATE, Brightness, assert_same, gradients, problem

DEVICE = torch.device("cpu")
PATHS = {"flow": FlowPath(), "vp": VariancePreservingPath()}


def rows_of(found: core.Experience, size: int = 64) -> core.Rows:
    (rows,) = found.batches(size, DEVICE)
    return rows


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the forward process from an anchor -------------------------------------------------------------------------------


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


# -- DiffusionNFT -----------------------------------------------------------------------------------------------------


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


# -- Flow-GRPO --------------------------------------------------------------------------------------------------------


def test_without_noise_grpos_sampler_is_the_ode():
    sigma, output = torch.tensor([0.5, 1.0]), drawn(2, 3, 4, 4)
    prediction = FlowPath().interpret("velocity", output, drawn(2, 3, 4, 4, seed=1), sigma)
    following = torch.tensor([0.3, 0.8])
    still, plain = Sde("grpo", 0.0)(prediction, following), Ode()(prediction, following)
    assert torch.equal(still.mean, plain.mean) and not still.std.any()


def test_grpos_step_is_the_released_one():
    """``x (1 + s^2/(2 sigma) dt) + u (1 + s^2 (1 - sigma)/(2 sigma)) dt`` and ``s sqrt(-dt)``, ``dt < 0``."""
    u, x, sigma, lower = drawn(1, 3, 4, 4), drawn(1, 3, 4, 4, seed=1), 0.6, 0.45
    settings = FlowGrpo(noise_level=0.7)
    prediction = FlowPath().interpret("velocity", u, x, torch.tensor([sigma], dtype=torch.float64))
    found = settings.kernel()(prediction, torch.tensor([lower], dtype=torch.float64))
    s, dt = 0.7 * math.sqrt(sigma / (1 - sigma)), lower - sigma
    expected = x * (1 + s**2 / (2 * sigma) * dt) + u * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(found.mean, expected)
    assert found.std.item() == pytest.approx(s * math.sqrt(-dt))
    after = expected + 0.1
    reference = Normal(expected, s * math.sqrt(-dt)).log_prob(after).mean()
    torch.testing.assert_close(settings.log_prob(found, after), reference[None])


@pytest.mark.parametrize("settings", [
    FlowGrpo(samples_per_prompt=2), FlowGrpo(samples_per_prompt=2, sampler="cps", window_size=2, branch=True),
])  # fmt: skip
def test_on_policy_the_ratio_is_exactly_one(settings):
    task = problem(moved=0.05)
    found = settings.collect(task, UPDATE)
    ratios, losses = [], []
    for start in range(0, len(found), 4):  # in the batches that they were drawn in: one step of all samples
        part = found.kept((torch.arange(len(found)) // 4) == start // 4)
        loss, figures = attrs.evolve(settings, kl_weight=0.0).loss(task, rows_of(part))
        ratios.append(figures["ratio"])
        losses.append(loss + rows_of(part)["advantage"])
    assert ratios == [1.0] * len(ratios)
    assert all(float(loss.abs().max()) == 0 for loss in losses)


def test_grpos_gradient_is_that_of_the_log_probability():
    """On policy, ``-A grad log p``; and away from it, a numerical derivative along the gradient."""
    task, settings = problem(moved=0.05), FlowGrpo(samples_per_prompt=2, kl_weight=0.0, clip_range=0.5, window_size=1)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, _ = settings.loss(task, rows)
    steps = rows["step"]
    output = task.policy.backbone.upstream(
        core.NoisyLatent(rows["before"], task.sigmas[steps]), task.conditions.index(rows.owners)
    )
    sigma, dt = task.sigmas[steps], task.sigmas[steps + 1] - task.sigmas[steps]
    s = settings.noise_level * (sigma / (1 - torch.where(sigma == 1, task.sigmas[1], sigma))).sqrt()
    x = rows["before"]
    factor = [spread(one, x) for one in (1 + s**2 / (2 * sigma) * dt, (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt)]
    mean = x * factor[0] + output * factor[1]
    log_prob = Normal(mean, spread(s * (-dt).sqrt(), x)).log_prob(rows["after"]).flatten(1).mean(1)
    assert_same(gradients(task, losses), gradients(task, -rows["advantage"] * log_prob), 1e-3)


def test_grpos_loss_is_the_pessimistic_one_of_both_ratios():
    ratio = torch.tensor([0.5, 1.0, 1.5])
    assert clipped_loss(ratio, torch.ones(3), 0.2).tolist() == pytest.approx([-0.5, -1.0, -1.2])
    assert clipped_loss(ratio, -torch.ones(3), 0.2).tolist() == pytest.approx([0.8, 1.0, 1.5])


def test_a_ratio_that_explodes_is_left_out_and_counted():
    task, settings = problem(moved=0.05), FlowGrpo(samples_per_prompt=2, kl_weight=0.0)
    found = settings.collect(task, UPDATE)
    found.rows["log_prob"][0] -= 100.0
    found.rows["log_prob"][1] = math.nan
    losses, figures = settings.loss(task, rows_of(found))
    assert figures["exploded"] == pytest.approx(2 / len(found))
    assert losses[:2].tolist() == [0.0, 0.0]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(task, losses).values())


def test_a_group_that_branches_is_one_until_its_window():
    task, settings = problem(), FlowGrpo(samples_per_prompt=3, window_size=2, window_range=(1, 3), branch=True)
    found = settings.collect(task, UPDATE)
    first = found.rows["step"] == 1
    before, after = found.rows["before"][first], found.rows["after"][first]
    assert sorted(set(found.rows["step"].tolist())) == [1, 2]
    assert torch.equal(before[0], before[1]) and torch.equal(before[3], before[5])
    assert not torch.equal(before[0], before[3])
    assert not torch.equal(after[0], after[1])


@pytest.mark.parametrize(("fields", "said"), [
    ({"window_size": 3, "window_range": (0, 2)}, "a window of 3 steps in \\[0, 2\\)"),
    ({"window_size": 1, "window_range": (3, 9)}, "does not fit the 4 steps that can draw"),
])  # fmt: skip
def test_a_window_that_does_not_fit_is_an_error(fields, said):
    with pytest.raises(core.ConfigError, match=said):
        FlowGrpo(samples_per_prompt=2, **fields).collect(problem(), UPDATE)


# -- DRaFT ------------------------------------------------------------------------------------------------------------


def by_hand(task: TrainProblem, steps: int, first: int, noise: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """The latents after ``steps`` of the sampler's steps, those from ``first`` on with their gradient."""
    z, condition = noise, task.conditions.index(owners)
    for k in range(steps):
        with torch.set_grad_enabled(k >= first):
            u = task.policy.backbone.upstream(core.NoisyLatent(z, task.sigmas[k].expand(len(z))), condition)
            z = z + (task.sigmas[k + 1] - task.sigmas[k]) * u
    return z


@pytest.mark.parametrize(("back", "stop"), [(1, None), (3, None), (2, (3, 3)), (None, None)])
def test_drafts_gradient_is_full_autograds_with_the_first_steps_detached(back, stop):
    task = problem(moved=0.05)
    settings = Draft(samples_per_prompt=2, backward_steps=back, stop=stop, regularisation=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, figures = settings.loss(task, rows)
    steps = STEPS if stop is None else 3
    z = by_hand(task, steps, steps - (back or steps), task.noise(rows["seed"]), rows.owners)
    expected = -torch.tanh(z.flatten(1).mean(1))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert_same(gradients(task, losses), gradients(task, expected), 1e-3)
    assert figures["value"] == pytest.approx(-float(expected.mean()), rel=1e-4)


def test_draft_holds_the_policy_to_the_reference():
    task, settings = problem(moved=0.05), Draft(backward_steps=1, regularisation=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    plain, _ = settings.loss(task, rows)
    held, _ = attrs.evolve(settings, regularisation=0.5).loss(task, rows)
    z, level = by_hand(task, STEPS - 1, STEPS, task.noise(rows["seed"]), rows.owners), task.sigmas[STEPS - 1].expand(2)
    ours, frozen = (net.upstream(core.NoisyLatent(z.detach(), level), task.conditions.index(rows.owners))
                    for net in (task.policy.backbone, task.reference))  # fmt: skip
    torch.testing.assert_close(held - plain, 0.5 * (ours - frozen).square().flatten(1).mean(1), rtol=2e-3, atol=1e-6)


def test_draft_lv_averages_the_last_step_over_fresh_noise():
    task, settings = problem(moved=0.05), Draft(renoised=3, regularisation=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, _ = settings.loss(task, rows)
    clean = by_hand(task, STEPS, STEPS, task.noise(rows["seed"]), rows.owners).detach()
    level = float(task.sigmas[STEPS - 1])
    expected = torch.zeros(2)
    for n in range(3):
        noise = task.noise(core.spread_seed(rows["seed"], 3)[n::3])
        z = (1 - level) * clean + level * noise
        u = task.policy.backbone.upstream(
            core.NoisyLatent(z, torch.full((2,), level)), task.conditions.index(rows.owners)
        )
        expected = expected - torch.tanh((z - level * u).flatten(1).mean(1)) / 3
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert_same(gradients(task, losses), gradients(task, expected), 1e-3)


def test_refl_goes_through_the_estimators_own_denoiser_pass():
    """No step of the sampler has a gradient; ``relu(margin - r(D(z0_hat)))`` has."""
    backbone, reward = families.mmdit(), families.clip()
    task = problem(backbone, Tweedie(reward), moved=0.05)
    task = attrs.evolve(task, reward_conditions=reward.encode_prompts(["a red ball", "a blue box"]))
    settings = Draft(backward_steps=0, stop=(4, 4), margin=2.0, regularisation=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, _ = settings.loss(task, rows)
    z = by_hand(task, 4, 4, task.noise(rows["seed"]), rows.owners).detach()
    level = task.sigmas[4]
    u = task.policy.backbone.upstream(core.NoisyLatent(z, level.expand(2)), task.conditions.index(rows.owners))
    images = backbone.decode_latents(z - level * u)
    expected = torch.relu(2.0 - reward.rate(images, task.reward_conditions.index(rows.owners)))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert_same(gradients(task, losses), gradients(task, expected), 1e-3)
    with pytest.raises(core.ConfigError, match="backward_steps is 0"):
        settings.collect(attrs.evolve(task, estimator=Brightness()), UPDATE)


def kept_for_backward(task: TrainProblem, settings: Draft) -> int:
    """Bytes that autograd keeps of one loss."""
    rows = rows_of(settings.collect(task, UPDATE))
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        settings.loss(task, rows)
    return total


def test_memory_does_not_grow_with_the_steps_without_gradient():
    task = problem()
    side = task.latent_shape[-1]
    longer = attrs.evolve(task, sigmas=task.reference.sigmas(4 * STEPS, (side, side)))
    one, more = Draft(backward_steps=1), Draft(backward_steps=3)
    assert kept_for_backward(task, one) == kept_for_backward(longer, one) > 0
    assert kept_for_backward(task, more) > 2 * kept_for_backward(task, one)


def test_random_truncation_draws_its_depth_and_the_stop_its_step():
    task = problem()
    updates = [attrs.evolve(UPDATE, number=n) for n in range(40)]
    settings = Draft(truncation="random", backward_steps=None, stop=(2, 4))
    found = [rows_of(settings.collect(task, update)) for update in updates]
    stops = {int(rows["stop"][0]) for rows in found}
    depths = {int(rows["stop"][0] - rows["first"][0]) for rows in found}
    assert stops == {2, 3, 4} and depths == {1, 2, 3, 4}
    again = rows_of(settings.collect(task, updates[7]))
    assert torch.equal(again["stop"], found[7]["stop"]) and torch.equal(again["first"], found[7]["first"])


@pytest.mark.parametrize(("stop", "said"), [((0, 3), "stop is \\[0, 3\\]"), ((2, 9), "1 to 5"), ((4, 2), "in order")])
def test_a_stop_outside_the_steps_is_an_error(stop, said):
    for settings in (Draft(stop=stop), DiffusionNft(samples_per_prompt=2, stop=stop)):
        with pytest.raises(core.ConfigError, match=said):
            settings.collect(problem(), UPDATE)
