"""Which strength of a sweep is marked."""

from __future__ import annotations

from typing import Any

import pytest

from stitchvm.core.reproduction.report import mark_best


def row(at: float, target: float, fulfilled: tuple[float, float] | None, curve: str = "Tweedie") -> dict[str, Any]:
    gain = None if fulfilled is None else {"mean": fulfilled[0], "stderr": fulfilled[1]}
    return {"backbone": "b", "reward": "r", "curve": curve, "at": at, "best": False, "detector_gain": gain,
            "scores": {"r": {"mean": target, "stderr": 0.1}}}  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "marked"),
    [
        ([(0.1, 0.02), (-0.03, 0.02), (-0.05, 0.02)], 3),  # the last loses more than two standard errors
        ([(-0.1, 0.02), (-0.1, 0.02), (-0.3, 0.02)], 10),  # all do: the highest target
        ([None, None, None], 10),  # no detector
    ],
)
def test_the_best_strength_keeps_the_captions_where_one_does(losses: list[Any], marked: int) -> None:
    rows = [row(at, at, loss) for at, loss in zip((1, 3, 10), losses, strict=True)]
    other = row(5, 0.0, (0.0, 0.1), curve="stitched")
    mark_best([*rows, other])
    assert [each["at"] for each in rows if each["best"]] == [marked]
    assert other["best"], "each curve has its own"
