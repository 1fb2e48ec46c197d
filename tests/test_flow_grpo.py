"""Flow-GRPO against independent formulas: its step, its log-probability, and its gradient."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from torch.distributions import Normal

from stitchvm import core
from stitchvm.core import Ode, Sde
from stitchvm.core.paths import FlowPath, spread
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo, clipped_loss
from test_draft import by_hand
from training_worlds import STEPS, UPDATE, assert_same, drawn, gradients, problem, rows_of


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
    assert not any(bool(loss.any()) for loss in losses)


def test_grpos_gradient_is_that_of_the_log_probability():
    """On policy, ``-A grad log p``."""
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


def test_off_policy_the_gradient_is_a_numerical_one():
    """Where some ratios are clipped and others are not, along the gradient itself: ``(L(+h) - L(-h)) / 2h``.

    Clipped rows hold still, so that the derivative is that of a smooth function; float32 leaves three digits.
    """
    task = problem(moved=0.05)
    settings = FlowGrpo(samples_per_prompt=4, kl_weight=0.0, clip_range=1e-3, ratio_bound=1e6)
    rows = rows_of(settings.collect(task, UPDATE))
    parameters = task.policy.parameters

    def shift(by: dict[str, torch.Tensor], size: float) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(size * by[name])

    shift({name: drawn(*p.shape, seed=len(name)).float() for name, p in parameters.items()}, 0.02)
    losses, _ = settings.loss(task, rows)
    found = gradients(task, losses)
    whole = attrs.evolve(settings, clip_range=100.0)
    free = gradients(task, whole.loss(task, rows)[0])
    assert any(not torch.allclose(found[name], free[name], rtol=1e-2) for name in found)  # some are clipped
    norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    direction, size = {name: g / norm for name, g in found.items()}, 2e-3
    means = []
    for step in (size, -2 * size):
        shift(direction, step)
        with torch.no_grad():
            means.append(float(settings.loss(task, rows)[0].double().mean()))
    assert (means[0] - means[1]) / (2 * size) == pytest.approx(norm, rel=0.05)


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_the_distance_from_the_reference_is_that_of_the_steps_means(sampler):
    """As released, ``|mean - mean_ref|^2 / (2 s^2)``, a mean over the dimensions: ``s`` of ``sde`` is the noise in a
    unit of time, ``a sqrt(t / (1 - t))``, that of ``cps`` the step's own, ``t' sin(a pi / 2)``."""
    task = problem(moved=0.05)
    settings = FlowGrpo(samples_per_prompt=2, kl_weight=0.0, sampler=sampler, noise_level=0.6)
    rows = rows_of(settings.collect(task, UPDATE))
    plain, _ = settings.loss(task, rows)
    held, figures = attrs.evolve(settings, kl_weight=2.0).loss(task, rows)
    x, steps, condition = rows["before"], rows["step"], task.conditions.index(rows.owners)
    sigma, dt = task.sigmas[steps], task.sigmas[steps + 1] - task.sigmas[steps]
    ours, frozen = (
        net.upstream(core.NoisyLatent(x, sigma), condition) for net in (task.policy.backbone, task.reference)
    )
    if sampler == "sde":
        s = 0.6 * (sigma / (1 - torch.where(sigma == 1, task.sigmas[1], sigma))).sqrt()
        factor = (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    else:  # (x - t u)(1 - t') + (x + (1 - t) u) sqrt(t'^2 - s^2)
        after = task.sigmas[steps + 1]
        s = after * math.sin(0.3 * math.pi)
        factor = (1 - sigma) * (after.square() - s.square()).sqrt() - sigma * (1 - after)
    expected = (factor**2) * (ours - frozen).square().flatten(1).mean(1) / (2 * s**2)
    torch.testing.assert_close(held - plain, 2 * expected, rtol=2e-3, atol=1e-6)
    assert_same(gradients(task, held - plain), gradients(task, 2 * expected), 5e-3)
    assert figures["divergence"] == pytest.approx(float(expected.detach().mean()), rel=2e-3)


@pytest.mark.parametrize("sampler", ["sde", "cps"])
@pytest.mark.parametrize("stop", [None, (3, 3)])
def test_with_hardly_any_noise_a_sample_is_the_odes_and_read_where_it_stops(sampler, stop):
    task = problem(moved=0.05)
    settings = FlowGrpo(samples_per_prompt=2, sampler=sampler, noise_level=1e-6, stop=stop)
    found = settings.collect(task, UPDATE)
    steps, owners = STEPS if stop is None else 3, torch.tensor([0, 0, 1, 1])
    clean = by_hand(task, steps, steps, task.noise(task.seeds(UPDATE, 2, 0)), owners)
    assert found.figures["value"] == pytest.approx(float(torch.tanh(clean.flatten(1).mean(1)).mean()), abs=2e-5)
    assert found.figures["stop"] == steps


def test_a_window_begins_anywhere_in_its_range():
    task, settings = problem(), FlowGrpo(samples_per_prompt=2, window_size=1, window_range=(1, 4))
    begun = {settings.window(task, attrs.evolve(UPDATE, number=n), STEPS)[0] for n in range(40)}
    assert begun == {1, 2, 3}


def test_an_advantage_is_clipped():
    task, settings = problem(), FlowGrpo(samples_per_prompt=4, advantage_clip=0.5)
    found = settings.collect(task, UPDATE).samples["advantage"]
    assert float(found.max()) == 0.5 and float(found.min()) >= -0.5


def test_the_released_cps_likelihood_is_a_mean_without_its_variance():
    settings, task = FlowGrpo(samples_per_prompt=2, sampler="cps"), problem(moved=0.05)
    latents, steps = task.noise(torch.tensor([1, 2])), torch.tensor([1, 2])
    transition = settings.transition(task, latents, steps, torch.tensor([0, 1]))
    found = settings.log_prob(transition, transition.mean + 0.5)
    torch.testing.assert_close(found, torch.full((2,), -0.25))


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


def test_where_a_window_lies_says_nothing_without_one():
    with pytest.raises(core.ConfigError, match="give window_size too"):
        FlowGrpo(window_range=(0, 2))


@pytest.mark.parametrize(("fields", "steps", "said"), [
    ({"window_size": 3, "stop": (2, 4)}, 5, "a window of 3 steps in \\[0, 2\\).*stops after 2 of 5"),
    ({}, 1, "does not fit the 0 steps that can draw"),
])  # fmt: skip
def test_a_window_must_fit_wherever_a_rollout_stops(fields, steps, said):
    task = problem()
    side = task.latent_shape[-1]
    task = attrs.evolve(task, sigmas=task.reference.sigmas(steps, (side, side)))
    with pytest.raises(core.ConfigError, match=said):
        FlowGrpo(samples_per_prompt=2, **fields).check(task)
