"""Stage 2's weights of noise levels: each level by the inverse of its own error, on average 1."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from stitchvm.core.stitching.levels import LEVELS, LevelBalance


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def fresh() -> LevelBalance:
    return LevelBalance.of(["r/embedding", "r/tokens"], torch.device("cpu"))


def test_bins_are_levels_with_and_without_a_prompt() -> None:
    sigma = torch.tensor([0.0, 0.05, 0.55, 1.0, 0.55])
    prompted = torch.tensor([False, False, False, False, True])
    assert LevelBalance.bins(sigma, prompted).tolist() == [0, 0, 5, 9, LEVELS + 5]


def test_levels_count_by_the_inverse_of_their_errors(accelerator: Accelerator) -> None:
    balance, bins = fresh(), torch.tensor([1, 1, 8])
    errors = torch.tensor([0.1, 0.3, 0.8])
    first = balance.weigher("r", bins)("embedding", errors)
    assert torch.equal(first, errors), "nothing is known before the first step"
    balance.update(accelerator)
    weighed = balance.weigher("r", bins)("embedding", torch.ones(3))
    # means 0.2 and 0.8: inverses 5 and 1.25, mean 3.125
    assert weighed.tolist() == pytest.approx([1.6, 1.6, 0.4])
    assert balance.weigher("r", bins)("tokens", torch.ones(3)).tolist() == [1, 1, 1], "each term has means of its own"
    assert balance.weigher("r", torch.tensor([4]))("embedding", torch.ones(1)).tolist() == [1], "unseen"


def test_the_means_run(accelerator: Accelerator) -> None:
    balance, bins = fresh(), torch.tensor([1])
    for error in (1.0, 2.0):
        balance.weigher("r", bins)("embedding", torch.tensor([error]))
        balance.update(accelerator)
    assert float(balance.means[0, 1]) == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert int(balance.means.isnan().sum()) == balance.means.numel() - 1


def test_weights_carry_no_gradient_of_their_own(accelerator: Accelerator) -> None:
    balance, bins = fresh(), torch.tensor([1, 8])
    balance.weigher("r", bins)("embedding", torch.tensor([0.2, 0.8]))
    balance.update(accelerator)
    errors = torch.tensor([0.5, 0.5], requires_grad=True)
    balance.weigher("r", bins)("embedding", errors).sum().backward()
    assert errors.grad is not None and errors.grad.tolist() == pytest.approx([1.6, 0.4])
