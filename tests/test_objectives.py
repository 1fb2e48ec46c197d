"""The order of a prompt's seeds as a loss: against ``corrcoef``, where there is none to see, and in half precision."""

from __future__ import annotations

import pytest
import torch

from families import clip
from stitchvm.core.reward import RewardOutput
from stitchvm.core.stitching.objectives import LEAST_SPREAD, predicted_score, ranking_loss


def test_ranking_loss_is_one_minus_the_mean_correlation_of_the_groups() -> None:
    draw = torch.Generator().manual_seed(0)
    target, score = torch.randn(2, 12, generator=draw)
    group = torch.tensor([0.0] * 4 + [1.0] * 4 + [-1.0] * 4)
    target[8:10] = torch.nan
    truth = [torch.corrcoef(torch.stack([score[k : k + 4], target[k : k + 4]]))[0, 1] for k in (0, 4)]
    known = ~target.isnan()
    loss = ranking_loss(score[known], target, group)
    assert loss == pytest.approx(1 - float(sum(truth)) / 2, abs=1e-6)
    # neither a shift nor a scale of one group's scores changes it
    moved = torch.cat([5 * score[:4] + 3, score[4:]])
    assert ranking_loss(moved[known], target, group) == pytest.approx(float(loss), abs=1e-5)
    target[:4] = 0.7  # a group without an order drops out
    assert ranking_loss(score[known], target, group) == pytest.approx(1 - float(truth[1]), abs=1e-6)


def test_a_value_that_ignores_the_seed_has_a_bounded_slope() -> None:
    """Nearly equal scores, as half precision rounds them: no more than one over a hundredth of the rewards' spread."""
    score = torch.full((8,), 0.9, requires_grad=True)
    target = torch.randn(8, generator=torch.Generator().manual_seed(0))
    ranking_loss(score, target, torch.zeros(8)).backward()
    assert score.grad is not None
    spread = float((target - target.mean()).norm())
    assert float(score.grad.norm()) == pytest.approx(1 / (LEAST_SPREAD * spread), rel=1e-4)


def test_scores_are_told_apart_in_float32_whatever_the_tower_ran_in() -> None:
    """Two embeddings a thousandth apart have one bfloat16 cosine between them, and two in float32."""
    reward, draw = clip(), torch.Generator().manual_seed(1)
    text = reward.encode_prompts(["a cat"])["text"]
    first = text + 0.3 * torch.randn(text.shape, generator=draw)
    embedding = torch.cat([first, first + 1e-2 * torch.randn(text.shape, generator=draw)]).bfloat16()
    target = {"score": torch.zeros(2), "condition.text": text.expand(2, -1)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predicted_score(reward, RewardOutput(torch.zeros(2, 1, 1), embedding), target)
    cosine = torch.nn.functional.cosine_similarity(embedding.double(), text.double())
    assert found is not None and found.dtype == torch.float32
    assert float((found - cosine).abs().max()) < 1e-6 < float((cosine[0] - cosine[1]).abs())
