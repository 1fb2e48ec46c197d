"""Guidance, twisted SMC and the searches over proposals, against closed forms of the analytic world."""

from __future__ import annotations

from itertools import pairwise

import attrs
import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward, QuadraticReward
from problems import problem, weighted_moments
from stitchvm.core import (
    Ancestral,
    ConfigError,
    CostMeter,
    FlowPath,
    Ode,
    OnPath,
    Sde,
    Tweedie,
    VariancePreservingPath,
    as_sigma,
    load_aligner,
)

PATHS = {"flow": FlowPath(), "variance-preserving": VariancePreservingPath()}
STRENGTH = 1.5


def method(name, **settings):
    return load_aligner(name)(**settings)


# -- gradient guidance


def guided_moments(backbone, reward, kernel, steps, start=(0.0, 1.0)):
    """Mean and variance ``[C]`` of what exact soft guidance samples: all of it is affine, so two probes carry it.

    ``start`` are the moments of ``z0`` at the first level: of pure noise none are left.
    """
    value = ExactValue(backbone, reward, soft=True, strength=STRENGTH)
    task = problem(backbone, reward, value)
    side, channels = backbone.native_resolution, backbone.latent_channels
    probes = torch.stack([level.expand(channels, side, side) for level in torch.tensor([0.0, 1.0])])
    sigmas = backbone.sigmas(steps, (side, side))
    alpha = backbone.path.alpha(sigmas[0])
    mean, variance = (torch.as_tensor(moment).expand(channels) for moment in start)
    mean, variance = alpha * mean, alpha**2 * variance + sigmas[0] ** 2
    for sigma, following in pairwise(sigmas):
        look = attrs.evolve(task, noise=probes[None]).differentiate(probes, sigma)
        step = kernel(look.prediction.guided(STRENGTH * look.gradients), as_sigma(following, probes))
        offset, slope = step.mean[0, :, 0, 0], (step.mean[1] - step.mean[0])[:, 0, 0]
        mean, variance = offset + slope * mean, slope**2 * variance + step.std[0] ** 2
    return mean, variance


@pytest.mark.parametrize("kernel", [Ode(), Sde(), Ancestral()], ids=["ode", "sde", "ancestral"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_exact_soft_guidance_samples_the_tilted_gaussian_as_the_step_shrinks(path, kernel):
    """Mean and covariance of ``p(z0) exp(strength r(z0))``; first order: twice the steps, half the error."""
    backbone, reward = GaussianBackbone(path=path), QuadraticReward(centre=1.0, scale=0.7)
    true = reward.tilted(torch.full((3,), 0.3), torch.full((3,), 0.64), STRENGTH)
    errors = []
    for steps in (100, 200, 400):
        found = guided_moments(backbone, reward, kernel, steps, start=true)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, true, strict=True)))
    assert float((true[0] - 0.3).abs().min()) > 0.05
    assert errors[2] < 0.01
    for coarse, fine in pairwise(errors):
        assert fine < 0.7 * coarse + 1e-3


def test_dps_samples_what_its_kernel_says():
    """5,000 samples a channel: mean and variance within five standard errors of the affine chain's."""
    backbone, reward = GaussianBackbone(), QuadraticReward(centre=1.0, scale=0.7)
    value = ExactValue(backbone, reward, soft=True, strength=STRENGTH)
    found = method("dps", strength=STRENGTH).run(problem(backbone, reward, value, particles=1250, steps=40))
    mean, variance = guided_moments(backbone, reward, Sde(), 40)
    samples = found.latents[0].transpose(0, 1).flatten(1)
    assert ((samples.mean(1) - mean).abs() < 5 * (variance / 5000).sqrt()).all()
    assert ((samples.var(1) - variance).abs() < 5 * variance * (2 / 5000) ** 0.5).all()
    joint = torch.cov(found.latents[0].flatten(1).T)
    error = float(variance.max()) / 1250**0.5
    assert ((joint - joint.diag().diag()).abs() < 5 * error).all()


def test_guidance_of_strength_zero_is_the_plain_sampler():
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, ExactValue(backbone, reward), prompts=2, particles=3)
    guided = method("dps", strength=0.0, kernel="ode").run(task)
    assert torch.equal(guided.latents, method("best-of-n").run(task).latents)


def test_a_gradient_through_the_denoiser_is_tweedies():
    """For a linear reward Tweedie's value is exact, and so is its gradient; one denoiser pass a step serves both."""
    backbone, reward = GaussianBackbone(), LinearReward()
    runs, costs = [], []
    for estimator in (ExactValue(backbone, reward), Tweedie(reward)):
        task = problem(backbone, reward, estimator, particles=5, steps=6)
        with CostMeter() as cost:
            runs.append(method("dps", strength=3.0).run(task).latents)
        costs.append(cost.passes)
    torch.testing.assert_close(runs[0], runs[1], atol=1e-4, rtol=1e-4)
    assert costs[0]["denoiser"] == costs[1]["denoiser"] == 30
    assert costs[1]["decoder"] == 30 + 5


def look_at(backbone, guidance_scale=1.0, sigma=0.6):
    task = problem(backbone, LinearReward(), ExactValue(backbone, LinearReward()), prompts=2, particles=1,
                   guidance_scale=guidance_scale)  # fmt: skip
    if guidance_scale != 1:
        denoiser = attrs.evolve(task.context.denoiser, condition=backbone.encode_prompts(["0.5", "-1"]))
        task = attrs.evolve(task, context=attrs.evolve(task.context, denoiser=denoiser))
    return task.differentiate(task.noise.flatten(0, 1), torch.tensor(sigma))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_normalisers_scale_the_gradient_as_published(path):
    backbone = GaussianBackbone(path=path)
    look = look_at(backbone, guidance_scale=4.0)
    g, latents = look.gradients, look.prediction.latents
    conditions = backbone.encode_prompts(["0.5", "-1"]), backbone.null_condition().expand(2)
    prompted, without = (backbone.denoise(latents, as_sigma(0.6, latents), c).eps for c in conditions)
    contrast = prompted - without
    change = {name: method("dps", strength=2.0, normaliser=name).score_change(look) for name in
              ("raw", "norm", "unit-rms", "epsilon", "rms-ratio")}  # fmt: skip
    torch.testing.assert_close(change["raw"], 2 * g)
    for sample in range(2):
        torch.testing.assert_close(change["norm"][sample].norm(), torch.tensor(2.0))
        torch.testing.assert_close(change["unit-rms"][sample].square().mean().sqrt(), torch.tensor(2.0))
        # FreeDoM: rms(eps_cond - eps_uncond) cfg / rms(g) 0.2, times the strength.
        moved = (0.6 * change["rms-ratio"][sample]).square().mean().sqrt()
        torch.testing.assert_close(moved, 2 * 0.2 * 4.0 * contrast[sample].square().mean().sqrt())
    # UGD: eps - c sqrt(1 - alpha_bar) g, alpha_bar by the signal-to-noise ratio.
    ratio = float(path.alpha(torch.tensor(0.6))) / 0.6
    noise = (1 / (1 + ratio**2)) ** 0.5
    torch.testing.assert_close(0.6 * change["epsilon"], 2 * noise * g)


def test_the_ratio_to_guidance_needs_guidance():
    with pytest.raises(ConfigError, match="guidance_scale above 1"):
        method("dps", normaliser="rms-ratio").score_change(look_at(GaussianBackbone()))


@pytest.mark.parametrize(
    ("schedule", "share"), [("constant", 1), ("sigma", 0.6), ("alpha", 0.4), ("cosine", 0.9510565)]
)
def test_the_strength_follows_its_schedule(schedule, share):
    look = look_at(GaussianBackbone())
    torch.testing.assert_close(method("dps", schedule=schedule).score_change(look), share * look.gradients)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_bound_holds_back_large_changes_alone(path):
    """Of the noise estimate, a sample at a time, the direction kept."""
    look = look_at(GaussianBackbone(path=path))
    look.gradients[0] *= 40 / look.gradients[0].square().mean().sqrt()
    look.gradients[1] *= 0.1 / look.gradients[1].square().mean().sqrt()
    free, bound = (method("dps", strength=0.5, clip=clip).score_change(look) for clip in (None, 0.3))
    moved = look.prediction.eps - look.prediction.guided(bound).eps
    torch.testing.assert_close(moved[0].square().mean().sqrt(), torch.tensor(0.3))
    torch.testing.assert_close(moved[0], 0.3 / (0.6 * 20) * 0.6 * free[0])
    assert torch.equal(bound[1], free[1])


def test_outside_its_window_guidance_reads_no_value():
    backbone, reward = GaussianBackbone(), LinearReward()
    value = ExactValue(backbone, reward)
    method("dps", window=(3, 5), unit="step").run(problem(backbone, reward, value, particles=2, steps=10))
    assert value.seen == [2, 2]


def test_time_travel_repeats_a_step_and_keeps_the_marginals():
    """Of an unguided sampler: going back by the forward process and down again changes no distribution."""
    backbone, reward = GaussianBackbone(), LinearReward()
    value = ExactValue(backbone, reward)
    task = problem(backbone, reward, value, particles=1250, steps=100)
    found = method("dps", strength=0.0, repeats=3, window=(0.4, 0.6), kernel="ancestral").run(task)
    assert len(value.seen) == 3 * 20
    samples = found.latents[0].transpose(0, 1).flatten(1)
    assert ((samples.mean(1) - 0.3).abs() < 5 * 0.8 / 5000**0.5 + 0.01).all()
    assert ((samples.var(1) - 0.64).abs() < 5 * 0.64 * (2 / 5000) ** 0.5 + 0.02).all()


def test_renoising_is_the_forward_process():
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, None, particles=5000)
    low, high = torch.tensor(0.3), torch.tensor(0.7)
    clean = torch.full((5000, 3, 2, 2), 0.5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    moved = task.renoise(0.7 * clean + 0.3 * noise, low, high)
    count = moved.numel()
    assert abs(float(moved.mean()) - 0.3 * 0.5) < 5 * 0.7 / count**0.5
    assert abs(float(moved.std()) - 0.7) < 5 * 0.7 / (2 * count) ** 0.5


# -- twisted SMC


class Halved:
    """Half the exact value, and something: no value to trust, which the weights have to make up for."""

    def __init__(self, backbone, reward):
        self.exact = ExactValue(backbone, reward)

    def __call__(self, latents, sigma, context, prediction=None):
        return 0.5 * self.exact(latents, sigma, context, prediction) + 0.3 * latents[:, 0].mean((1, 2))


@pytest.mark.parametrize(
    "settings",
    [{"resampler": "ssp"}, {"resampler": "multinomial"}, {"resampler": "residual", "ess_threshold": 1.0},
     {"tempering": 0.2}, {"interpolant": "variance-preserving"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)  # fmt: skip
@pytest.mark.parametrize("exact", [True, False])
def test_twisted_particles_follow_the_tilted_distribution(exact, settings):
    """Whatever the value: mean and second moment of ``p(z0) exp(strength r)`` in 40 runs, within four standard
    errors."""
    backbone, reward, strength = GaussianBackbone(side=1), QuadraticReward(centre=1.0, scale=0.5, side=1), 1.0
    value = ExactValue(backbone, reward) if exact else Halved(backbone, reward)
    das = method("das", strength=strength, **settings)
    found = das.run(problem(backbone, reward, value, prompts=40, particles=256, steps=8))
    kernel = OnPath(Sde(), VariancePreservingPath()) if "interpolant" in settings else Sde()
    plain = backbone.marginal(kernel, backbone.sigmas(8, (1, 1)))
    mean, variance = reward.tilted(*plain, strength)
    estimated, second = weighted_moments(found)
    error = estimated.std(0) / 40**0.5
    assert (error < 0.03).all()
    assert ((mean - plain[0]).abs() > 6 * error).all()
    assert ((estimated.mean(0) - mean).abs() < 4 * error).all()
    assert ((second.mean(0) - mean**2 - variance).abs() < 4 * second.std(0) / 40**0.5).all()


def test_a_twist_held_back_shifts_nothing():
    backbone, reward = GaussianBackbone(), LinearReward()
    latents = []
    for settings in ({"strength": 8.0, "tempering": 1e-9}, {"strength": 0.0}):
        task = problem(backbone, reward, ExactValue(backbone, reward))
        latents.append(method("das", ess_threshold=0.0, **settings).run(task).latents)
    torch.testing.assert_close(*latents, atol=1e-5, rtol=1e-5)


def test_gradient_proposals_keep_more_particles_alive():
    """The proposals' point: with them the final weights are more even than FK steering's with the same value."""
    backbone, reward = GaussianBackbone(), LinearReward()
    sizes = []
    for name, settings in (("das", {}), ("fk-steering", {"interval": 1, "window": (0.0, 1.0)})):
        task = problem(backbone, reward, ExactValue(backbone, reward), prompts=20, particles=16, steps=20)
        found = method(name, strength=8.0, ess_threshold=0.0, **settings).run(task)
        sizes.append(float((1 / found.weights.square().sum(1)).mean()))
    assert sizes[0] > 1.5 * sizes[1]


# -- searches


def mean_reward(name, task, **settings):
    return float(method(name, **settings).run(task).rewards.mean())


@pytest.mark.parametrize(("name", "settings"), [("svdd", {"proposals": 6}), ("rbf", {"quota": 6}), ("dsearch", {})])
def test_searching_raises_the_reward_by_many_standard_errors(name, settings):
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, ExactValue(backbone, reward), prompts=25, particles=4, steps=12)
    found, plain = (method(n, **s).run(task).rewards.flatten() for n, s in ((name, settings), ("best-of-n", {})))
    assert float((found - plain).mean()) > 6 * float((found - plain).std()) / 100**0.5


def test_one_proposal_is_the_kernel_alone():
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, ExactValue(backbone, reward), prompts=2, particles=3)
    again = problem(backbone, reward, ExactValue(backbone, reward), prompts=2, particles=3)
    alone = method("svdd", proposals=1).run(task).latents
    assert torch.equal(alone, method("dps", window=(0.0, 0.0)).run(again).latents)


def test_more_proposals_help_more():
    backbone, reward = GaussianBackbone(), LinearReward()
    means = []
    for proposals in (1, 4, 16):
        task = problem(backbone, reward, ExactValue(backbone, reward), prompts=40, particles=2)
        means.append(mean_reward("svdd", task, proposals=proposals))
    assert means[0] < means[1] < means[2]


class Counted:
    """The exact value, noting how many latents it was asked for in each call."""

    def __init__(self, backbone, reward):
        self.exact, self.asked = ExactValue(backbone, reward), []

    def __call__(self, latents, sigma, context, prediction=None):
        self.asked.append(len(latents))
        return self.exact(latents, sigma, context, prediction)


def test_what_a_step_did_not_need_rolls_over():
    """All values equal: the first draw of the first step is above minus infinity, later ones never above the best, so
    each uses up its whole budget: 1, then quota + (quota - 1), then quota a step."""
    backbone, reward, asked = GaussianBackbone(), LinearReward(), []

    def flat(latents, sigma, context, prediction=None):
        asked.append(len(latents))
        return torch.zeros(len(latents))

    method("rbf", quota=3).run(problem(backbone, reward, flat, particles=1, steps=5))
    assert sum(asked) == 1 + (3 + 2) + 3 + 3


def test_the_budget_is_never_exceeded_and_only_open_rows_are_evaluated():
    backbone, reward = GaussianBackbone(), LinearReward()
    value = Counted(backbone, reward)
    method("rbf", quota=3).run(problem(backbone, reward, value, prompts=3, particles=2, steps=10))
    assert 6 * 9 <= sum(value.asked) <= 6 * 9 * 3
    assert min(value.asked) < 6


def test_a_beam_keeps_the_best_of_all_branches():
    """With a value that is known, the survivors of one branching are the highest of every particle's draws."""
    backbone, reward = GaussianBackbone(), LinearReward()
    task = problem(backbone, reward, ExactValue(backbone, reward), prompts=1, particles=3, steps=4)
    drawn = []
    estimate = ExactValue(backbone, reward)

    def noting(latents, sigma, context, prediction=None):
        values = estimate(latents, sigma, context, prediction)
        drawn.append(values)
        return values

    found = method("dsearch", branches=4, interval=10, window=(0.0, 0.0)).run(attrs.evolve(task, estimator=noting))
    (values,) = drawn
    assert len(values) == 12
    parents = values.topk(3).indices // 4
    assert found.ancestry[0].tolist() == parents.tolist()


@pytest.mark.parametrize("name", ["svdd", "rbf", "dsearch", "das"])
def test_methods_that_draw_refuse_the_ode(name):
    with pytest.raises(ConfigError, match="the ode kernel draws no noise"):
        method(name, kernel="ode")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("dps", {"normaliser": "l2"}), ("dps", {"repeats": 0}), ("dps", {"clip": 0.0}),
     ("rbf", {"quota": 0}), ("dsearch", {"branches": 1}),
     ("dps", {"window": (0.8, 0.2)}), ("svdd", {"window": (0.0, 1.2)}), ("das", {"tempering": 0.0}),
     ("svdd", {"window": (7.0, 3.0), "unit": "step"}), ("dps", {"kernel": "cps", "eta": 0.5})],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(name, **settings)


@pytest.mark.parametrize("name", ["dps", "das", "fk-steering", "svdd", "rbf", "dsearch"])
def test_steps_are_taken_on_the_path_that_is_asked_for(name):
    chosen = method(name, kernel="sde", scale=0.5, interpolant="variance-preserving").transition_kernel()
    assert isinstance(chosen, OnPath) and isinstance(chosen.path, VariancePreservingPath)
    assert chosen.kernel == Sde(scale=0.5)


def test_tempering_rises_as_published():
    from stitchvm.plugins.aligners.tempering import tempered

    assert tempered(None, 5) == 1
    assert tempered(0.008, 0) == 0
    assert tempered(0.008, 50) == pytest.approx(1.008**50 - 1)
    assert tempered(0.008, 100) == 1
