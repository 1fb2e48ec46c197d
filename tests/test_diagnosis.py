"""Diagnosis of value estimators, in the analytic world, where ranking, calibration and gradients are known."""

from __future__ import annotations

from itertools import pairwise

import attrs
import pytest
import torch

from analytic import ExactValue, GaussianBackbone, LinearReward, MomentReward, QuadraticReward, exact_stitched
from stitchvm.core import (
    Ancestral,
    ConfigError,
    Diagnosis,
    MonteCarlo,
    NonFiniteError,
    Ode,
    Sde,
    Stitched,
    Tweedie,
    diagnose,
)
from stitchvm.core.diagnosis.gradients import compare_gradients, cosine
from stitchvm.core.diagnosis.ranking import Trajectories, rank_seeds
from stitchvm.core.diagnosis.run import calibration

QUIET = {"guidance_scale": 1.0, "progress": False}
SIGMAS = (0.6, 0.4, 0.2)
PROMPTS = [str(n / 20 - 1) for n in range(40)]
"""Each shifts all latents, by -1 to 0.95."""


@attrs.frozen(eq=False)
class Moved:
    """``factor`` times an estimator, plus ``offset``."""

    inner: object
    factor: float = 1.0
    offset: float = 0.0

    def __call__(self, latents, sigma, context, prediction=None):
        return self.factor * self.inner(latents, sigma, context, prediction) + self.offset


@attrs.frozen(eq=False)
class ByPrompt:
    """An estimator plus ``factor`` times the prompt's number: wrong between prompts, right within."""

    inner: object
    factor: float

    def __call__(self, latents, sigma, context, prediction=None):
        shift = context.denoiser.condition["shift"].flatten()
        return self.inner(latents, sigma, context, prediction) + self.factor * shift


@attrs.frozen(eq=False)
class Random:
    """The product of each latent with a direction that depends on nothing else."""

    def __call__(self, latents, sigma, context, prediction=None):
        draw = torch.Generator().manual_seed(int(latents.detach().double().abs().sum() * 1e6) % 2**31)
        return (latents * torch.randn(latents.shape, generator=draw)).flatten(1).sum(1)


@pytest.fixture(scope="module")
def calibrated() -> Diagnosis:
    """1000 trajectories of a linear reward under the forward process's own reverse, whose mean has no error of finite
    steps: ``E[E[z0 | z_s] | z_t] = E[z0 | z_t]``."""
    backbone, reward = GaussianBackbone(), LinearReward()
    exact = ExactValue(backbone, reward, prompted=True)
    estimators = {
        "exact": exact, "doubled": Moved(exact, 2.0), "raised": Moved(exact, offset=0.7), "flat": Moved(exact, 0.0),
        "by prompt": ByPrompt(exact, 3.0),
    }  # fmt: skip
    return diagnose(backbone, estimators, reward, PROMPTS, kernel=Ancestral(), seeds=25, steps=20, sigmas=SIGMAS,
                    gradients=False, batch=1000, **QUIET)  # fmt: skip


def close(figure, expected):
    """A figure within four of its standard errors, which are small enough to tell it from others."""
    found, stderr = figure
    assert stderr is not None and 0 < stderr < 0.08
    return abs(found - expected) < 4 * stderr


def test_the_exact_value_is_calibrated_under_a_stochastic_kernel(calibrated):
    """Within four standard errors below 0.08: a slope of 1/2 would not pass."""
    figures = calibrated.figures("exact")
    for level in range(len(SIGMAS)):
        for name, expected in {"slope": 1.0, "within_slope": 1.0, "bias": 0.0, "intercept": 0.0}.items():
            assert close(figures[name][level], expected), (name, level, figures[name][level])


def test_the_noise_of_every_trajectory_is_its_own(calibrated):
    """What the exact value leaves over varies within prompts as it does in all, and the other way round: shares of the
    variance with an error of 5 %."""
    rest = calibrated.ranking.rewards - calibrated.ranking.values["exact"][0]
    assert rest.var(1).mean() / rest.var() == pytest.approx(1.0, abs=0.15)
    assert rest.var(0).mean() / rest.var() == pytest.approx(1.0, abs=0.15)


def test_a_doubled_value_has_half_the_slope_and_a_raised_one_its_bias(calibrated):
    exact, doubled, raised = (calibrated.figures(name) for name in ("exact", "doubled", "raised"))
    for level in range(len(SIGMAS)):
        for name in ("slope", "within_slope"):
            assert [2 * part for part in doubled[name][level]] == pytest.approx(exact[name][level], rel=1e-5)
            assert raised[name][level] == pytest.approx(exact[name][level], rel=1e-4)
        assert close(doubled["slope"][level], 0.5)
        assert raised["bias"][level][0] - exact["bias"][level][0] == pytest.approx(0.7, abs=1e-5)
        assert doubled["rank"][level] == exact["rank"][level]


def test_what_is_wrong_between_prompts_alone_leaves_the_slope_within_them(calibrated):
    figures, exact = calibrated.figures("by prompt"), calibrated.figures("exact")
    for level in range(len(SIGMAS)):
        assert figures["within_slope"][level] == pytest.approx(exact["within_slope"][level], rel=1e-4)
        assert figures["slope"][level][0] < 0.6


def test_a_constant_value_has_no_slope_and_ranks_nothing(calibrated):
    figures = calibrated.figures("flat")
    assert figures["slope"] == figures["intercept"] == figures["within_slope"] == [(None, None)] * len(SIGMAS)
    assert figures["rank"] == [(0.0, 0.0)] * len(SIGMAS)


def test_estimators_are_compared_prompt_by_prompt(calibrated):
    """What ranks alike differs by exactly nothing; from what ranks nothing the difference is the rank itself."""
    exact, alike = calibrated.figures("exact")["rank"], [(0.0, 0.0)] * len(SIGMAS)
    beside = calibrated.beside("doubled", "exact")
    assert beside["difference"] == alike and beside["share"] == [(1.0, 0.0)] * len(SIGMAS)
    beside = calibrated.beside("flat", "exact")
    assert beside["difference"] == [(-rank, pytest.approx(error)) for rank, error in exact] and beside["share"] == alike
    assert calibrated.beside("exact", "flat")["share"] == [(None, None)] * len(SIGMAS)
    told = calibrated.report()["estimators"]["flat"]["beside"]
    assert set(told) == set(calibrated.ranking.values) - {"flat"}
    assert told["exact"]["difference"] == [gain for gain, _ in beside["difference"]]
    assert told["exact"]["difference_stderr"] == [error for _, error in beside["difference"]]


def test_another_kernel_has_its_own_slope():
    """A linear reward under :class:`Sde`: the slope of ``z0`` in ``z_t`` over the steps left, probed on two latents,
    over the posterior mean's. It is far from 1, 1.46 at sigma 0.5."""
    backbone, reward = GaussianBackbone(), LinearReward()
    found = diagnose(backbone, {"exact": ExactValue(backbone, reward)}, reward, [""] * 40, kernel=Sde(), seeds=25,
                     sigmas=(0.5, 0.25), steps=28, gradients=False, batch=1000, **QUIET)  # fmt: skip
    grid, probes = backbone.sigmas(28, (2, 2)), torch.zeros(2, 3, 2, 2)
    probes[1] = 1
    for figure, sigma in zip(found.figures("exact")["within_slope"], found.ranking.sigmas, strict=True):
        moved = probes
        for level, following in pairwise(grid[grid <= sigma + 1e-6]):
            moved = Sde()(backbone.denoise(moved, level, backbone.null_condition()), following.expand(2)).mean
        mean, _ = backbone.posterior(probes, sigma)
        expected = float((moved[1] - moved[0]).mean() / (mean[1] - mean[0]).mean())
        assert close(figure, expected) and expected > 1.05, (sigma, figure, expected)


def test_tweedie_is_too_high_by_the_posterior_variance():
    """``-|z0 - c|^2`` summed over 3 channels: Jensen's gap is ``3 Var[z0 | z_t]``."""
    backbone, reward = GaussianBackbone(), QuadraticReward()
    found = diagnose(backbone, {"exact": ExactValue(backbone, reward), "tweedie": Tweedie(reward)}, reward, ["", ""],
                     kernel=Sde(), seeds=4, sigmas=SIGMAS, steps=10, gradients=False, **QUIET)  # fmt: skip
    exact, tweedie = (found.figures(name)["bias"] for name in ("exact", "tweedie"))
    for level, sigma in enumerate(found.ranking.sigmas):
        _, variance = backbone.posterior(torch.zeros(1, 3, 2, 2), sigma)
        assert tweedie[level][0] - exact[level][0] == pytest.approx(3 * float(variance), rel=1e-3)


def test_the_exact_clean_value_ranks_as_the_reward_does_at_little_noise():
    """What is left of the randomness at sigma 0.02 is 1/40 of the spread."""
    backbone, reward = GaussianBackbone(), QuadraticReward()
    found = diagnose(backbone, {"exact": ExactValue(backbone, reward)}, reward, ["", ""], kernel=Ancestral(), steps=50,
                     seeds=40, sigmas=(0.9, 0.02), gradients=False, **QUIET).figures("exact")  # fmt: skip
    assert found["rank"][1][0] > 0.99
    assert abs(found["rank"][0][0]) < 0.8


def test_the_ode_has_its_reward_settled_and_a_slope_above_one():
    """For a linear reward the reward's deviation over the value's, ``sqrt(alpha^2 s^2 + sigma^2) / (alpha s)`` with
    ``s`` the data's: every trajectory lies on the line, up to 1 % for the steps."""
    backbone, reward = GaussianBackbone(), LinearReward()
    found = diagnose(backbone, {"exact": ExactValue(backbone, reward)}, reward, ["", ""], steps=200, seeds=6,
                     sigmas=SIGMAS, gradients=False, **QUIET)  # fmt: skip
    for (slope, stderr), sigma in zip(found.figures("exact")["within_slope"], SIGMAS, strict=True):
        alpha, spread = 1 - sigma, 0.8
        assert slope == pytest.approx((alpha**2 * spread**2 + sigma**2) ** 0.5 / (alpha * spread), rel=0.01)
        assert stderr < 1e-3


def test_standard_errors_are_the_scatter_of_the_figures():
    """Prompts with a common error of the reward and of the value's slope: over 200 repetitions the mean standard error
    is the figures' deviation, whose own error is 5 %. Errors without clusters would be half as large."""
    draw = torch.Generator().manual_seed(3)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(200):
        values = torch.randn(40, 1, generator=draw) + torch.randn(40, 8, generator=draw)
        shared = torch.randn(40, 1, generator=draw)
        rewards = (1 + 0.5 * torch.randn(40, 1, generator=draw)) * values + shared + torch.randn(40, 8, generator=draw)
        for name, figure in calibration(values, rewards).items():
            found.setdefault(name, []).append(figure)
    assert set(found) == {"slope", "intercept", "bias", "within_slope"}
    for name, figures in found.items():
        numbers, errors = torch.tensor(figures, dtype=torch.float64).T
        assert errors.mean() / numbers.std() == pytest.approx(1.0, abs=0.17), name


def test_one_prompt_has_figures_without_errors():
    figures = calibration(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 5.0]]))
    assert {name: stderr for name, (_, stderr) in figures.items()} == dict.fromkeys(figures)
    assert figures["slope"][0] == pytest.approx(2) and figures["intercept"][0] == pytest.approx(1)
    assert figures["bias"][0] == pytest.approx(-2) and figures["within_slope"][0] == pytest.approx(2)


def test_gradients_of_a_linear_reward_agree_and_random_ones_do_not():
    """Every rollout's gradient is the reward's own direction then. Random directions in 12 dimensions have a cosine of
    deviation 0.29, and those of a level 0.05 in the mean over 32."""
    backbone, reward = GaussianBackbone(), LinearReward()
    exact = ExactValue(backbone, reward)
    estimators = {
        "exact": exact, "reversed": Moved(exact, -1.0), "tiny": Moved(exact, 1e-12), "random": Random(),
        "tweedie": Tweedie(reward), "mc-2": MonteCarlo(reward, rollouts=2, steps=3),
        "stitched": Stitched(exact_stitched(backbone, reward)),
    }  # fmt: skip
    found = diagnose(backbone, estimators, reward, PROMPTS[:16], kernel=Sde(), steps=12, seeds=2, sigmas=SIGMAS,
                     gradient_rollouts=4, gradient_prompts=16, rollout_steps=3, **QUIET)  # fmt: skip
    for name in ("exact", "tiny", "tweedie", "mc-2", "stitched"):
        assert [mean for mean, _ in found.figures(name)["cosine"]] == pytest.approx([1.0] * 3, abs=1e-5), name
    assert [mean for mean, _ in found.figures("reversed")["cosine"]] == pytest.approx([-1.0] * 3, abs=1e-5)
    assert all(close(figure, 0.0) for figure in found.figures("random")["cosine"])
    assert found.gradients.ceiling == pytest.approx([1.0] * 3, abs=1e-5)


def test_the_ceiling_is_what_the_exact_gradient_reaches():
    """For a quadratic reward the reference is noisy. In 192 dimensions the noise's share of it, common to all latents,
    is off by a tenth of itself: the ceiling by 0.03 at most, where it is 0.75."""
    backbone, reward = GaussianBackbone(side=8), QuadraticReward(side=8)
    found = diagnose(backbone, {"exact": ExactValue(backbone, reward)}, reward, [""] * 8, kernel=Ancestral(), steps=20,
                     seeds=3, sigmas=(0.75, 0.5), gradient_rollouts=4, gradient_prompts=8, gradient_seeds=3,
                     rollout_steps=8, **QUIET)  # fmt: skip
    for (mean, _), ceiling in zip(found.figures("exact")["cosine"], found.gradients.ceiling, strict=True):
        assert mean == pytest.approx(ceiling, abs=0.03) and ceiling < 0.93


def test_a_zero_gradient_points_nowhere():
    assert cosine(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0.0]
    assert cosine(1e-30 * torch.ones(1, 3).double(), torch.ones(1, 3).double()).tolist() == pytest.approx([1.0])


def test_costs_are_of_one_latent_and_each_estimators_own():
    """Three rollouts of two steps from a known prediction are three denoiser passes; a gradient runs one more."""
    backbone, reward = GaussianBackbone(), LinearReward()
    estimators = {
        "tweedie": Tweedie(reward), "mc-3": MonteCarlo(reward, rollouts=3, steps=2),
        "stitched": Stitched(exact_stitched(backbone, reward)),
    }  # fmt: skip
    report = diagnose(backbone, estimators, reward, ["", "0.5"], seeds=4, steps=10, gradient_rollouts=2,
                      rollout_steps=2, sigmas=(0.9, 0.5, 0.51), batch=3, **QUIET).report()  # fmt: skip
    passes = {
        name: {kind: {k: v for k, v in cost.items() if k != "seconds"} for kind, cost in entry["cost"].items()}
        for name, entry in report["estimators"].items()
    }
    assert passes == {
        "tweedie": {"forward": {"decoder": 1, "reward": 1}, "gradient": {"denoiser": 1, "decoder": 1, "reward": 1}},
        "mc-3": {"forward": {"denoiser": 3, "decoder": 3, "reward": 3},
                 "gradient": {"denoiser": 4, "decoder": 3, "reward": 3}},
        "stitched": {"forward": {"head": 1, "tail": 1}, "gradient": {"head": 1, "tail": 1}},
    }  # fmt: skip
    assert report["reference"]["cost"]["denoiser"] == 4 and report["generation"]["denoiser"] == 80
    assert all(cost["forward"]["seconds"] >= 0 for cost in (e["cost"] for e in report["estimators"].values()))


def test_batches_do_not_matter_nor_who_else_is_sampled():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    estimators = {"mc": MonteCarlo(reward, rollouts=1, steps=2)}
    settings = {"kernel": Sde(), "seeds": 3, "steps": 4, "gradient_rollouts": 2, "gradient_prompts": 2, **QUIET,
                "rollout_steps": 2, "sigmas": (0.7, 0.3)}  # fmt: skip
    runs = [diagnose(backbone, estimators, reward, PROMPTS[:3], batch=batch, **settings) for batch in (64, 2)]
    for run in runs[1:]:
        assert torch.equal(run.ranking.rewards, runs[0].ranking.rewards)
        assert torch.equal(run.ranking.values["mc"], runs[0].ranking.values["mc"])
        assert torch.equal(run.gradients.cosines["mc"], runs[0].gradients.cosines["mc"])
    alone = diagnose(backbone, estimators, reward, PROMPTS[:1], **settings)
    assert torch.equal(alone.ranking.rewards, runs[0].ranking.rewards[:1])


def test_gradients_are_taken_where_values_are_read():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    trajectories = Trajectories(backbone=backbone, reward=reward, prompts=tuple(PROMPTS[:3]), seeds=4, steps=8,
                                guidance_scale=1.0, sigmas=SIGMAS, kernel=Sde())  # fmt: skip
    rows = torch.tensor([1, 6])
    read = trajectories.follow({"exact": ExactValue(backbone, reward)}, "", False).values["exact"].flatten(1)[:, rows]
    for values, z, step in zip(read, trajectories.latents(rows), trajectories.levels, strict=True):
        again = ExactValue(backbone, reward)(z, trajectories.grid[step], trajectories.context(rows))
        assert torch.allclose(values, again, atol=1e-6)
    seen = []

    def record(latents, sigma, context, prediction=None):
        seen.append((latents.detach(), context.denoiser.condition["shift"].flatten().tolist()))
        return latents.flatten(1).sum(1)

    compare_gradients(trajectories, {"record": record}, 2, 2, 2, 2, Ancestral(), progress=False)
    for (latents, shifts), expected in zip(seen, trajectories.latents(torch.tensor([0, 1, 4, 5])), strict=True):
        assert torch.equal(latents, expected) and shifts == pytest.approx([-1.0, -1.0, -0.95, -0.95])


def test_the_ode_diagnosis_ranks_as_rank_seeds_does():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    ranked = rank_seeds(backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1"], seeds=5, seed=4, **QUIET)
    found = diagnose(backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1"], kernel=Ode(), seeds=5, seed=4,
                     gradients=False, **QUIET)  # fmt: skip
    assert torch.equal(found.ranking.values["tweedie"], ranked.values["tweedie"])
    assert found.report()["estimators"]["tweedie"]["rank"] == ranked.report()["tweedie"]


@attrs.frozen(eq=False)
class Lost:
    """No number for some latents, or no gradient for any."""

    detached: bool

    def __call__(self, latents, sigma, context, prediction=None):
        values = latents.flatten(1).mean(1)
        return values.detach() if self.detached else values.masked_fill(values > 0, float("nan"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"estimators": {}}, ConfigError, "no estimators"),
        ({"prompts": []}, ConfigError, "prompts is empty; give at least one"),
        ({"prompts": "a cat"}, ConfigError, "list of strings"),
        ({"seeds": 1}, ConfigError, "seeds is 1; give a whole number from 2 on"),
        ({"gradient_rollouts": 1}, ConfigError, "gradient_rollouts is 1"),
        ({"sigmas": (0.5, 1.5)}, ConfigError, "noise levels from 0"),
        ({"prompts": ["a", 3]}, ConfigError, r"prompts must be a list of strings, got \['a', 3\]"),
        ({"resolution": 5}, ConfigError, "resolution is 5 pixels; GaussianBackbone needs multiples of 2"),
        ({"resolution": 0}, ConfigError, "resolution is 0; give a whole number from 1 on"),
        ({"resolution": -2}, ConfigError, "resolution is -2; give a whole number from 1 on"),
        ({"resolution": "4"}, ConfigError, "resolution is '4'; give a whole number from 1 on"),
        ({"batch": 0}, ConfigError, "batch is 0; give a whole number from 1 on"),
        ({"batch": 2.5}, ConfigError, "batch is 2.5; give a whole number from 1 on"),
        ({"guidance_scale": -3}, ConfigError, "guidance_scale is -3; give a finite number from 0 on"),
        ({"estimators": {"odd": Lost(False)}}, NonFiniteError, "odd gave no finite value for .* at sigma"),
        ({"estimators": {"odd": Lost(True)}}, ConfigError, "odd is not differentiable"),
        ({"reward": MomentReward([0.0] * 3, [0.0] * 3, 1.0)}, ConfigError, "nothing to rank"),
    ],
)
def test_mistakes_are_one_clear_error(changed, error, message):
    reward = LinearReward()
    given = {"estimators": {"tweedie": Tweedie(reward)}, "reward": reward, "prompts": ["a"], "steps": 3, "seeds": 3,
             "gradient_rollouts": 2, "rollout_steps": 2, **QUIET, **changed}  # fmt: skip
    backbone = GaussianBackbone()
    if "resolution" in changed:
        backbone.latent_factor = 2
    with pytest.raises(error, match=message):
        diagnose(backbone, **given)
