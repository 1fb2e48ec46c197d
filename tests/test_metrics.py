"""Every metric against a formula of its own, and read off noisy latents by the rows' own noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from analytic import GaussianBackbone, LinearReward, exact_stitched
from stitchvm import core
from stitchvm.core.metrics import centred_similarity, metric_of, preference_accuracy, recall_by_chance
from stitchvm.core.sampling import seeded_noise
from stitchvm.core.seeds import stream_seed
from stitchvm.core.skills import Skill, SkillData

SIGMAS = (0.1, 0.5, 0.9)


def linear(metric: str | None = None) -> LinearReward:
    reward = LinearReward()
    reward.record = core.RewardRecord(name="linear", family="toy", metric=metric)
    return reward


def pictures(count: int, seed: int) -> Tensor:
    """uint8 ``[count, 3, 2, 2]``."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(100, 156, (count, 3, 2, 2), dtype=torch.uint8, generator=draw)


def exact_scores(images: Tensor, sigma: float, *stream: int, seed: int = 4) -> Tensor:
    """``E[r(z0) | z_t]`` of noised latents by the closed form, without a value model."""
    backbone = GaussianBackbone()
    clean = backbone.encode_images(images.float() / 255)
    noise = seeded_noise([stream_seed(seed, row, *stream) for row in range(len(clean))], clean.shape[1:], "cpu")
    noisy = (1 - sigma) * clean + sigma * noise
    return LinearReward().expectation(*backbone.posterior(noisy, sigma))


def measured(data: SkillData, metric: str, batch: int = 5) -> Skill:
    backbone, reward = GaussianBackbone(), linear(metric)
    models = {"stitched": exact_stitched(backbone, reward)}
    return data.measure(backbone, reward, models, sigmas=SIGMAS, seed=4, batch=batch, progress=False)


# -- pure measures ----------------------------------------------------------------------------------------------------


def test_preference_counts_wins_and_half_of_the_ties():
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randint(0, 4, (2, 200), generator=draw).float()
    points = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(left.tolist(), right.tolist(), strict=True))
    assert preference_accuracy(left, right) == pytest.approx(points / 200)
    assert preference_accuracy(left, right) + preference_accuracy(right, left) == pytest.approx(1)
    assert preference_accuracy(left, left) == 0.5
    assert preference_accuracy(left, left - 1) == 1
    with pytest.raises(core.ConfigError, match="at least one pair"):
        preference_accuracy(left[:0], right[:0])


def test_similarity_is_the_cosine_around_the_clean_mean():
    draw = np.random.default_rng(0)
    clean, noisy = draw.normal(3, 1, (2, 40, 6))
    e, f = (rows / np.sqrt((rows**2).sum(1, keepdims=True)) for rows in (clean, noisy))
    around, other = e - e.mean(0), f - e.mean(0)
    cosines = (around * other).sum(1) / np.sqrt((around**2).sum(1) * (other**2).sum(1))
    found = centred_similarity(torch.from_numpy(noisy), torch.from_numpy(clean))
    assert found == pytest.approx(cosines.mean())
    assert abs(found) < 0.3, "unrelated embeddings with a large common part look alike unless that is taken out"


def test_similarity_of_the_clean_embeddings_is_1_at_any_length():
    clean = 2 + torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    assert centred_similarity(clean, clean) == pytest.approx(1)
    assert centred_similarity(clean * torch.linspace(0.1, 5, 30)[:, None], clean) == pytest.approx(1)
    with pytest.raises(core.ConfigError, match="at least two"):
        centred_similarity(clean[:1], clean[:1])
    with pytest.raises(core.ConfigError, match="differ"):
        centred_similarity(torch.ones(3, 4), torch.ones(3, 4))


def test_chance_of_recall_is_that_of_a_random_answer():
    captions = ["a", "b", "a", "c"]
    hits = [captions[guess] == own for own in captions for guess in range(4)]
    assert recall_by_chance(captions) == pytest.approx(sum(hits) / len(hits))
    assert recall_by_chance(["a", "b", "c", "d"]) == 0.25


# -- which metric -----------------------------------------------------------------------------------------------------


def test_the_record_names_the_metric_or_what_the_reward_compares_with_decides():
    hps = core.build_twin(core.registry().reward("hpsv2"))
    assert metric_of(hps) == metric_of(core.build_twin(core.registry().reward("hpsv2.1"))) == "preference"
    for name, metric in (("clip-vit-l-14", "recall"), ("aesthetic", "rank"), ("dinov2-vit-l-14", "similarity")):
        assert metric_of(core.build_twin(core.registry().reward(name))) == metric
    assert metric_of(LinearReward()) == "rank", "a network built by hand has no record"
    assert metric_of(linear("similarity")) == "similarity"


def test_a_metric_that_the_reward_cannot_be_measured_by_is_refused():
    with pytest.raises(core.ConfigError, match="'linear' says metric = 'recall', which needs .* prompts"):
        metric_of(linear("recall"))
    with pytest.raises(ValueError, match="metric"):
        core.RewardRecord(name="x", family="clip", metric="beauty")
    data = SkillData("rank", (pictures(4, 0),), ratings=torch.arange(4.0))
    with pytest.raises(core.ConfigError, match="these pictures measure rank"):
        measured(data, "preference")


# -- over noise levels ------------------------------------------------------------------------------------------------


def test_rank_is_scipys_of_the_exact_value_at_every_level():
    images = pictures(23, 0)
    truth = LinearReward().judge(images.float() / 255).score
    ratings = truth + torch.randn(23, generator=torch.Generator().manual_seed(9))
    found = measured(SkillData("rank", (images,), ratings=ratings), "rank")
    assert found.clean == pytest.approx(spearmanr(truth, ratings).statistic)
    expected = [spearmanr(exact_scores(images, sigma), ratings).statistic for sigma in SIGMAS]
    assert list(found.models["stitched"]) == pytest.approx(expected)
    assert (found.chance, found.count) == (0.0, 23)


def test_preference_noises_both_pictures_of_a_pair_apart():
    better, worse = pictures(40, 1), pictures(40, 2)
    found = measured(SkillData("preference", (better, worse), ["x"] * 40), "preference")
    clean = [LinearReward().judge(part.float() / 255).score for part in (better, worse)]
    assert found.clean == pytest.approx(float((clean[0] > clean[1]).float().mean()))
    expected = [float((exact_scores(better, sigma) > exact_scores(worse, sigma, 1)).float().mean()) for sigma in SIGMAS]
    assert list(found.models["stitched"]) == pytest.approx(expected)
    same = measured(SkillData("preference", (better, better), ["x"] * 40), "preference")
    assert same.clean == 0.5
    assert any(value != 0.5 for value in same.models["stitched"]), "the same noise would make every pair a tie"


def test_similarity_of_the_clean_reward_is_1_and_falls_with_noise():
    found = measured(SkillData("similarity", (pictures(60, 3),)), "similarity")
    assert found.clean == pytest.approx(1) and found.chance is None
    values = found.models["stitched"]
    assert 1 > values[0] > values[1] > values[2] > -1


@pytest.mark.parametrize("metric", ["rank", "preference", "similarity"])
def test_the_batch_size_changes_nothing(metric):
    sets = (pictures(20, 5), pictures(20, 6))
    data = SkillData(metric, sets if metric == "preference" else sets[:1], ["x"] * 20, torch.arange(20.0))
    whole, parts = measured(data, metric, 64), measured(data, metric, 3)
    assert whole.models["stitched"] == pytest.approx(parts.models["stitched"])


def test_preference_reads_every_pair_with_its_own_prompt():
    reward = core.build_twin(core.registry().reward("hpsv2"))
    pairs = SkillData("preference", (pictures(9, 7), pictures(9, 8)), [f"prompt {'a' * n}" for n in range(9)])
    found = pairs.measure(GaussianBackbone(), reward, {}, sigmas=SIGMAS, batch=4, progress=False)
    condition = reward.condition(pairs.prompts)
    better, worse = (reward.rate(part.float() / 255, condition) for part in pairs.pictures)
    assert found.clean == pytest.approx(float((better > worse).float().mean()))
    turned = core.Condition({"text": condition["text"].flip(0)})
    assert not torch.allclose(better, reward.rate(pairs.pictures[0].float() / 255, turned), atol=1e-4)


def test_retention_is_the_plain_ratio_and_undefined_without_skill():
    skill = Skill("preference", (0.1, 0.5), 0.8, {"stitched": (0.8, 0.6)}, 10, 0.5)
    assert skill.retention("stitched") == [1, pytest.approx(0.75)]
    report = skill.report()
    assert report["retention"]["stitched"] == skill.retention("stitched") and report["chance"] == 0.5
    assert Skill("rank", (0.1,), -0.1, {"stitched": (0.3,)}, 10, 0.0).retention("stitched") == [None]


# -- data -------------------------------------------------------------------------------------------------------------


class Poor:
    def captioned(self, split, count, seed=0):
        return core.Captioned(pictures(count, seed), ["x"] * count)


@pytest.mark.parametrize(("metric", "method"), [("preference", "preferences"), ("rank", "rated")])
def test_a_dataset_without_what_a_metric_needs_is_one_error(metric, method):
    with pytest.raises(core.ConfigError, match=f"the metric '{metric}' needs .* {method}.*Poor does not"):
        SkillData.draw(metric, Poor(), 4)
    assert len(SkillData.draw("similarity", Poor(), 4).pictures[0]) == 4


def test_numbers_of_pictures_prompts_and_ratings_agree():
    with pytest.raises(core.ConfigError, match="got 2 / 2 / 1"):
        core.Preferences(pictures(2, 0), pictures(2, 0), ["a"])
    with pytest.raises(core.ConfigError, match="3 images"):
        core.Rated(pictures(3, 0), torch.zeros(2))


def test_unlabelled_pictures_keep_pairs_together():
    left, right = pictures(3, 0), pictures(3, 1)
    both = SkillData("preference", (left, right), ["x"] * 3).unlabelled()
    assert torch.equal(both[0::2], left) and torch.equal(both[1::2], right)
