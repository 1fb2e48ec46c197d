"""Within-prompt ranking of seeds, in the analytic world."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
from scipy.stats import spearmanr

from analytic import CONTRAST, ExactValue, GaussianBackbone, LinearReward, MomentReward, QuadraticReward, exact_stitched
from stitchvm.core import ConfigError, CostMeter, Stitched, Tweedie, rank_seeds
from stitchvm.core.diagnosis.ranking import Trajectories, closest_steps
from stitchvm.core.metrics import spearman

QUIET = {"guidance_scale": 1.0, "progress": False}


@attrs.frozen(eq=False)
class Signed:
    """An estimator times a number."""

    inner: object
    factor: float

    def __call__(self, latents, sigma, context, prediction=None):
        return self.factor * self.inner(latents, sigma, context, prediction)


def test_spearman_is_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (20, 9), generator=generator).float()
    rewards = torch.randint(0, 7, (20, 9), generator=generator).float()
    expected = [spearmanr(a, b).statistic for a, b in zip(values.numpy(), rewards.numpy(), strict=True)]
    assert torch.allclose(spearman(values, rewards), torch.tensor(expected, dtype=torch.float64))


def test_a_constant_value_ranks_nothing():
    assert spearman(torch.ones(1, 4), torch.arange(4.0)[None]).tolist() == [0.0]


def test_the_step_closest_to_each_level_is_read_never_the_end():
    grid = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0])

    assert closest_steps(grid, (0.94, 0.5, 0.26, 0.0)) == [1, 2, 3, 3]


def test_exact_values_rank_perfectly_reversed_ones_reversed_constant_ones_not_at_all():
    """The ODE moves every latent by the same affine map, so a linear reward's order is settled from the start."""
    backbone, reward = GaussianBackbone(), LinearReward()
    exact = ExactValue(backbone, reward)
    estimators = {"exact": exact, "reversed": Signed(exact, -1.0), "flat": Signed(exact, 0.0)}
    ranking = rank_seeds(backbone, estimators, reward, ["", ""], seeds=8, sigmas=(0.9, 0.5, 0.1), **QUIET)
    assert torch.allclose(ranking.correlations("exact"), torch.ones(3, 2, dtype=torch.float64))
    assert torch.allclose(ranking.correlations("reversed"), -torch.ones(3, 2, dtype=torch.float64))
    assert ranking.correlations("flat").abs().max() == 0


def test_values_are_read_at_the_latents_the_rewards_come_from():
    """One row by hand: the same noise, the same step, the same reward."""
    backbone, reward = GaussianBackbone(), QuadraticReward()
    ranking = rank_seeds(backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1"], seeds=3, steps=4, seed=5,
                         sigmas=(0.5,), batch=4, **QUIET)  # fmt: skip
    from stitchvm.core import Denoiser, sample
    from stitchvm.core.alignment.particles import initial_noise

    noise = initial_noise(5, [1], 3, (3, 2, 2))[0]
    condition = backbone.encode_prompts(["1"]).expand(3)
    seen = {}
    clean = sample(Denoiser(backbone, condition, backbone.null_condition()), noise, backbone.sigmas(4, (2, 2)),
                   callback=lambda step, latents, prediction: seen.update({step: prediction.z0}))  # fmt: skip
    assert ranking.sigmas == (0.5,)
    assert torch.allclose(ranking.rewards[1], reward.expectation(clean, 0.0), atol=1e-5)
    assert torch.allclose(ranking.values["tweedie"][0, 1], reward.expectation(seen[2], 0.0), atol=1e-5)


def test_batches_do_not_matter():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    runs = [
        rank_seeds(backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1", "0.5"], seeds=5, batch=batch, **QUIET)
        for batch in (64, 4, 1)
    ]
    for run in runs[1:]:
        assert torch.equal(run.rewards, runs[0].rewards)
        assert torch.equal(run.values["tweedie"], runs[0].values["tweedie"])


def test_costs_are_each_estimators_own():
    backbone, reward = GaussianBackbone(), LinearReward()
    estimators = {"tweedie": Tweedie(reward), "stitched": Stitched(exact_stitched(backbone, reward))}
    report = rank_seeds(backbone, estimators, reward, ["", ""], seeds=4, steps=10, **QUIET).report()
    passes = {name: {k: v for k, v in cost.items() if k not in ("seconds", "peak_memory")}
              for name, cost in {**report["cost"], "generation": report["generation"]}.items()}  # fmt: skip
    assert passes == {
        "tweedie": {"decoder": 40, "reward": 40},
        "stitched": {"head": 40, "tail": 40},
        "generation": {"denoiser": 80, "decoder": 8, "reward": 8},
    }


def test_prompts_of_constant_reward_are_left_out_and_counted():
    backbone = GaussianBackbone()

    class Cliff(MomentReward):
        """The same for every latent whose mean is low, which the prompt decides."""

        def score(self, output, condition):
            return output.score.clamp_min(2.0)

    reward = Cliff([1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    report = rank_seeds(backbone, {"tweedie": Tweedie(reward)}, reward, ["3", "-6", "4"], seeds=6, **QUIET).report()
    assert (report["prompts"], report["constant_prompts"], report["seeds"]) == (2, 1, 6)
    assert min(report["tweedie"]) > 0.5
    with pytest.raises(ConfigError, match="nothing to rank"):
        rank_seeds(backbone, {"tweedie": Tweedie(reward)}, reward, ["-6"], seeds=6, **QUIET)


def test_the_report_is_json_with_a_mean_and_an_error_for_every_level():
    backbone, reward = GaussianBackbone(), QuadraticReward()
    report = rank_seeds(backbone, {"tweedie": Tweedie(reward)}, reward, ["0", "1", "2"], seeds=4, **QUIET).report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert len(report["sigma"]) == len(report["tweedie"]) == len(report["stderr"]["tweedie"]) == 5
    assert max(abs(a - b) for a, b in zip(report["sigma"], report["requested"], strict=True)) <= 1 / 28


def test_judges_see_the_pictures_that_the_rewards_are_of_each_beside_its_prompt():
    """A judge of what the reward is made of is foreseen by whoever foresees the reward, its opposite the other way."""
    backbone, reward = GaussianBackbone(), MomentReward([1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    asked, middle = [], 0.5 + (0.3 + 1) / CONTRAST  # of the latents' mean and the prompt's shift

    def bright(images, prompts):
        asked.extend(prompts)
        return images[:, 0].mean((1, 2))

    judges = {"bright": bright, "dark": lambda images, prompts: -images[:, 0].mean((1, 2)),
              "second": lambda images, prompts: [prompt == "1" and bool(image[0].mean() > middle)
                                                 for image, prompt in zip(images, prompts, strict=True)]}  # fmt: skip
    prompts = ("0", "1", "-3")
    trajectories = Trajectories(backbone=backbone, reward=reward, prompts=prompts, seeds=6, steps=4,
                                guidance_scale=1.0, sigmas=(0.75, 0.25), batch=4)  # fmt: skip
    with CostMeter() as cost:
        ranking = trajectories.follow({"exact": ExactValue(backbone, reward)}, "x", progress=False, judges=judges)
    assert cost.passes["decoder"] == cost.passes["reward"] == 18, "pictures are decoded once for all"
    assert asked == [prompt for prompt in prompts for _ in range(6)]
    one = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(ranking.judged_correlations("exact", "bright"), one.expand(2, 3))
    assert torch.allclose(ranking.reward_correlations("bright"), one)
    assert torch.allclose(ranking.judged_correlations("exact", "dark"), -one.expand(2, 3))
    said = ranking.judged["second"]
    assert said.shape == (3, 6) and not said[[0, 2]].any() and 0 < int(said[1].sum()) < 6
    assert ranking.judged_correlations("exact", "second").shape == (2, 1), "one prompt's seeds differ"


def test_one_seed_cannot_be_ranked():
    with pytest.raises(ConfigError, match="two seeds"):
        rank_seeds(GaussianBackbone(), {}, LinearReward(), ["a"], seeds=1)
