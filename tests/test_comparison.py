"""Means, errors and paired gains against formulas by hand; prompts read from a file."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm.core import DataError
from stitchvm.core.comparison import MeanStderr, clustered_mean, mean_stderr, paired_gain, paired_share
from stitchvm.core.prompts import open_prompts


def test_mean_and_standard_error_by_hand():
    found = mean_stderr([1.0, 2.0, 6.0])
    assert found.mean == pytest.approx(3)
    assert found.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert found.report() == {"mean": found.mean, "stderr": found.stderr}


def test_a_share_of_booleans():
    found = mean_stderr(torch.tensor([True, True, False, True]))
    assert found.mean == 0.75
    assert found.stderr == pytest.approx(0.25)


def test_a_single_value_has_no_error():
    assert mean_stderr([2.0]) == MeanStderr(2.0, None)
    assert str(MeanStderr(2.0, None)) == "2"
    assert str(MeanStderr(0.12345, 0.0123)) == "0.1235 ± 0.012"


def test_what_prompts_share_cancels_in_a_paired_gain():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator) * 100
    gain = paired_gain(base + 1 + torch.randn(500, generator=generator) * 0.1, base)
    assert gain.mean == pytest.approx(1, abs=4 * 0.1 / math.sqrt(500))
    assert gain.stderr == pytest.approx(0.1 / math.sqrt(500), rel=0.15)
    assert paired_gain([1.0, 2.0], [3.0, 5.0]).mean == -2.5


def test_a_share_by_hand():
    """Means 3 and 4; what is left of the values beside 3/4 of the base is -0.5, 0.25 and 0.25."""
    found = paired_share([1.0, 4.0, 4.0], [2.0, 5.0, 5.0])
    assert found is not None and found.mean == pytest.approx(3 / 4)
    assert found.stderr == pytest.approx(math.sqrt((0.25 + 2 * 0.0625) / 2 / 3) / 4)
    assert paired_share([1.0, 2.0], [-1.0, 1.0]) is None
    assert paired_share([1.0], [2.0]) == MeanStderr(0.5, None)
    with pytest.raises(DataError, match="cannot pair 1 values with 2"):
        paired_share([1.0], [1.0, 2.0])


def test_the_error_of_a_share_covers_the_truth():
    """Two standard errors cover the true share, 0.8, 95.4 % of the time (of 500 draws, so within 3.7 % at 4 sigma; what
    is left out of the error to first order, (0.5 / sqrt 200)^2 of it, is a tenth of a percent)."""
    draw = torch.Generator().manual_seed(2)
    base = 1 + 0.5 * torch.randn(500, 200, generator=draw, dtype=torch.float64)
    values = 0.6 * base + 0.2 + 0.1 * torch.randn(500, 200, generator=draw, dtype=torch.float64)
    shares = [paired_share(*pair) for pair in zip(values.tolist(), base.tolist(), strict=True)]
    covered = sum(abs(share.mean - 0.8) < 2 * share.stderr for share in shares if share is not None and share.stderr)
    assert covered / 500 == pytest.approx(0.954, abs=0.037)


def test_the_standard_error_covers_the_truth():
    """Two standard errors cover the true mean 95.4 % of the time (of 500 draws, so within 3.7 % at 4 sigma)."""
    draws = torch.randn(500, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covered = sum(abs(found.mean) < 2 * found.stderr for found in map(mean_stderr, draws.tolist()))
    assert covered / 500 == pytest.approx(0.954, abs=0.037)


def test_clusters_of_one_are_independent_values():
    values = [1.0, 2.0, 6.0, -1.0]
    found, plain = clustered_mean(values, list("abcd")), mean_stderr(values)
    assert (found.mean, found.stderr) == (plain.mean, pytest.approx(plain.stderr))


def test_repeating_every_value_adds_nothing():
    """Twice the same five values are five values: the error of independent ones would be smaller by 3/2."""
    values = [1.0, 2.0, 6.0, -1.0, 0.5]
    found, plain = clustered_mean(values * 2, list("abcde") * 2), mean_stderr(values)
    assert (found.mean, found.stderr) == (pytest.approx(plain.mean), pytest.approx(plain.stderr))
    assert found.stderr == pytest.approx(1.5 * mean_stderr(values * 2).stderr)


def test_the_clustered_error_covers_the_truth():
    """300 times 100 clusters of one to three values that share a part: two errors cover 95 % (+- 4.5 at 3.6 sigma)."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{cluster}" for cluster in range(100) for _ in range(cluster % 3 + 1)]
    places = torch.tensor([int(name) for name in names])

    def covered() -> bool:
        shared = torch.randn(100, generator=generator)[places]
        found = clustered_mean((shared + torch.randn(len(names), generator=generator)).tolist(), names)
        return abs(found.mean) < 2 * found.stderr

    assert sum(covered() for _ in range(300)) / 300 == pytest.approx(0.95, abs=0.045)


def test_clusters_without_an_error():
    assert clustered_mean([1.0, 3.0], ["a", "a"]) == MeanStderr(2.0, None)
    with pytest.raises(DataError, match="2 values by 1 names"):
        clustered_mean([1.0, 3.0], ["a"])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_nothing_to_average(values):
    with pytest.raises(DataError):
        mean_stderr(values)


def test_unequal_numbers_are_no_pairs():
    with pytest.raises(DataError, match="cannot pair 2 values with 3"):
        paired_gain([1, 2], [1, 2, 3])


def test_prompts_from_a_file(tmp_path, fresh_registry):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blué star \nthird\n", encoding="utf-8")
    assert open_prompts(file) == ["a red circle", "a blué star", "third"]
    with pytest.raises(DataError, match="count of prompts is -1; give a whole number from 1 on"):
        open_prompts(str(file), -1)
    assert open_prompts(str(file), 2) == ["a red circle", "a blué star"]
    file.write_text(" \n")
    with pytest.raises(DataError, match="holds no prompt"):
        open_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="text file"):
        open_prompts(file)
    with pytest.raises(DataError, match="neither a file of prompts nor a dataset"):
        open_prompts(str(tmp_path / "none.txt"))
