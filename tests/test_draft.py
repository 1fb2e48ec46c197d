"""DRaFT and its relatives against full autograd, and what they keep for it."""

from __future__ import annotations

import attrs
import pytest
import torch

import families
from stitchvm import core
from stitchvm.core import TrainProblem, Tweedie
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from training_worlds import STEPS, UPDATE, Brightness, assert_same, gradients, problem, rows_of


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
    assert figures["value"] == pytest.approx(-float(expected.detach().mean()), rel=1e-4)


def test_draft_holds_the_policy_to_the_reference():
    task, settings = problem(moved=0.05), Draft(backward_steps=1, regularisation=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    plain, _ = settings.loss(task, rows)
    held, _ = attrs.evolve(settings, regularisation=0.5).loss(task, rows)
    z, level = by_hand(task, STEPS - 1, STEPS, task.noise(rows["seed"]), rows.owners), task.sigmas[STEPS - 1].expand(2)
    ours, frozen = (net.upstream(core.NoisyLatent(z.detach(), level), task.conditions.index(rows.owners))
                    for net in (task.policy.backbone, task.reference))  # fmt: skip
    torch.testing.assert_close(held - plain, 0.5 * (ours - frozen).square().flatten(1).mean(1), rtol=2e-3, atol=1e-6)


def test_the_distance_is_a_mean_over_the_steps_with_gradient_and_has_one():
    task, settings = problem(moved=0.05), Draft(backward_steps=2, regularisation=0.0)
    rows = rows_of(settings.collect(task, UPDATE))
    plain, _ = settings.loss(task, rows)
    held, _ = attrs.evolve(settings, regularisation=0.5).loss(task, rows)
    first, condition = STEPS - 2, task.conditions.index(rows.owners)
    z, expected = by_hand(task, first, first, task.noise(rows["seed"]), rows.owners), 0.0
    for k in (first, first + 1):
        u = task.policy.backbone.upstream(core.NoisyLatent(z, task.sigmas[k].expand(2)), condition)
        with torch.no_grad():
            frozen = task.reference.upstream(core.NoisyLatent(z, task.sigmas[k].expand(2)), condition)
        expected = expected + (u - frozen).square().flatten(1).mean(1) / 2
        z = z + (task.sigmas[k + 1] - task.sigmas[k]) * u
    torch.testing.assert_close(held - plain, 0.5 * expected, rtol=2e-3, atol=1e-6)
    assert_same(gradients(task, held - plain), gradients(task, 0.5 * expected), 5e-3)


def test_a_value_above_the_margin_is_not_raised_further():
    task = problem(moved=0.05)
    rows = rows_of(Draft().collect(task, UPDATE))
    below, above = (Draft(margin=margin, regularisation=0.0).loss(task, rows)[0] for margin in (5.0, -5.0))
    plain, _ = Draft(regularisation=0.0).loss(task, rows)
    torch.testing.assert_close(below, 5.0 + plain)
    assert not above.any()


@pytest.mark.parametrize("stop", [STEPS, 3])
def test_draft_lv_averages_the_last_step_over_fresh_noise(stop):
    """Back from where it stopped by one step: ``a z_tau + sqrt(t^2 - a^2 tau^2) eps``, ``a (1 - tau) = 1 - t``."""
    task, settings = problem(moved=0.05), Draft(renoised=3, regularisation=0.0, stop=(stop, stop))
    rows = rows_of(settings.collect(task, UPDATE))
    losses, _ = settings.loss(task, rows)
    ended = by_hand(task, stop, stop, task.noise(rows["seed"]), rows.owners).detach()
    level, tau = float(task.sigmas[stop - 1]), float(task.sigmas[stop])
    weight = (1 - level) / (1 - tau)
    expected = torch.zeros(2)
    for n in range(3):
        noise = task.noise(core.spread_seed(rows["seed"], 3)[n::3])
        z = weight * ended + (level**2 - weight**2 * tau**2) ** 0.5 * noise
        u = task.policy.backbone.upstream(
            core.NoisyLatent(z, torch.full((2,), level)), task.conditions.index(rows.owners)
        )
        expected = expected - torch.tanh((z - (level - tau) * u).flatten(1).mean(1)) / 3
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
    held, _ = attrs.evolve(settings, regularisation=0.5).loss(task, rows)
    frozen = task.reference.upstream(core.NoisyLatent(z, level.expand(2)), task.conditions.index(rows.owners))
    torch.testing.assert_close(held - losses, 0.5 * (u - frozen).square().flatten(1).mean(1), rtol=2e-3, atol=1e-5)
    settings.check(task)
    for other, window in ((Brightness(), (4, 4)), (Tweedie(reward), (4, 5)), (Tweedie(reward), None)):
        with pytest.raises(core.ConfigError, match="backward_steps is 0"):
            attrs.evolve(settings, stop=window).check(attrs.evolve(task, estimator=other))


class Numb(Brightness):
    """As bright, and without a gradient, as a reward is that reads finished pictures."""

    def __call__(self, latents, sigma, context, prediction=None):
        return super().__call__(latents.detach(), sigma, context)


@pytest.mark.parametrize("settings", [
    Draft(), Draft(regularisation=0.0), Draft(stop=(2, 3), renoised=2), Draft(backward_steps=None, margin=2.0),
])  # fmt: skip
def test_a_value_without_a_gradient_is_an_error_though_the_regularisation_has_one(settings):
    task = problem(estimator=Numb(), moved=0.05)
    rows = rows_of(settings.collect(task, UPDATE))
    with pytest.raises(
        core.ConfigError, match="the estimator Numb gives a value without one.*train with diffusion-nft"
    ):
        settings.loss(task, rows)
    with torch.no_grad():  # where nobody asks for one
        assert settings.loss(task, rows)[0].isfinite().all()


def test_a_reward_without_a_gradient_is_an_error_of_the_training(tmp_path):
    reward = families.clip()
    rate = reward.rate
    reward.rate = lambda images, condition: rate(images.detach(), condition)  # as of pictures on a disk
    plan = {"updates": 2, "lora": {"rank": 2, "alpha": 4}, "tracker": None}
    with pytest.raises(core.ConfigError, match="the estimator Tweedie gives a value without one"):
        core.train("draft", families.mmdit(), None, ["a red ball"], out=tmp_path, reward=reward, training=plan,
                   steps=3, progress=False)  # fmt: skip
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


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


def test_gaussian_truncation_begins_around_where_alignprop_does():
    """At 42 of 50 steps, give or take 5, cut at 49 and rounded: within four standard errors of draws of that."""
    task, count = problem(), 400
    side = task.latent_shape[-1]
    task = attrs.evolve(task, sigmas=task.reference.sigmas(50, (side, side)))
    settings = Draft(truncation="gaussian", backward_steps=None)
    first = [int(settings.collect(task, attrs.evolve(UPDATE, number=n)).samples["first"][0]) for n in range(count)]
    assert min(first) >= 1 and max(first) == 49
    begun = torch.tensor(first, dtype=torch.float64)
    draws = (42 + 5 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))).round()
    truth = draws[(draws >= 1) & (draws < 50)].double()
    assert abs(float(begun.mean() - truth.mean())) < 4 * float(truth.std()) / count**0.5
    assert abs(float(begun.std() - truth.std())) < 4 * float(truth.std()) / (2 * count) ** 0.5
    assert int(Draft(truncation="gaussian", backward_steps=3).collect(task, UPDATE).samples["first"][0]) >= 47


@pytest.mark.parametrize(("stop", "said"), [((0, 3), "stop is \\[0, 3\\]"), ((2, 9), "1 to 5"), ((4, 2), "in order")])
def test_a_stop_outside_the_steps_is_an_error(stop, said):
    for settings in (Draft(stop=stop), DiffusionNft(samples_per_prompt=2, stop=stop)):
        for asked in (settings.check, lambda task, settings=settings: settings.collect(task, UPDATE)):
            with pytest.raises(core.ConfigError, match=said):
                asked(problem())


@pytest.mark.parametrize("back", [0, 1])
def test_random_truncation_needs_steps_to_draw_from(back):
    with pytest.raises(core.ConfigError, match="of which nothing can be drawn"):
        Draft(truncation="random", backward_steps=back)
