"""What tables are made of: their rows' strengths, passes in one unit, the memory of one cell alone."""

from __future__ import annotations

import pytest
import torch

import families
from analytic import GaussianBackbone, LinearReward, exact_stitched
from stitchvm.core import ConfigError
from stitchvm.core.costs import peak_memory
from stitchvm.core.reproduction import alignment_tables
from stitchvm.core.reproduction.alignment_rows import TABLES, Pair, Settings, table_of
from stitchvm.core.reproduction.values import equivalents, pass_costs


def test_strengths_follow_the_scale_of_the_reward():
    settings = Settings()
    assert settings.sweep("stitched", "recall") == (10, 30, 100, 300) and settings.tilt("preference") == 60
    assert settings.sweep("stitched", "rank") == (3, 10, 20, 30) and settings.tilt("rank") == 2
    assert settings.sweep("tweedie", "rank") == (0.3, 1, 3, 10)
    unit = Settings(normaliser="unit-rms", strengths_tweedie=(7,))
    assert unit.sweep("stitched", "recall") == (0.1, 0.3, 1, 3) and unit.sweep("tweedie", "recall") == (7,)
    rows = {row.name: row for row in TABLES["table1"].make(unit, Pair("recall"))}
    assert rows["dps-tweedie-7"].settings == {"strength": 7, "normaliser": "unit-rms", "particles": 1}
    transfer = TABLES["table6"].make(Settings(methods=("dps",)), Pair("rank", ("b",)))
    assert [row.source for row in transfer] == [None] * 6 + ["b"] * 5


def test_passes_in_denoiser_passes():
    """A head and the rest of its pass are one pass; a world without matrix products has no such unit."""
    backbone, reward = families.mmdit(), families.clip()
    units = pass_costs(backbone, reward)
    assert units is not None and units["denoiser"] == units["resumed"] == 1
    assert equivalents({"denoiser": 6, "reward": 2, "seconds": 99.0}, units) == pytest.approx(6 + 2 * units["reward"])
    world = GaussianBackbone()
    value = exact_stitched(world, LinearReward())
    assert pass_costs(world, LinearReward(), value) is None and equivalents({"denoiser": 6}, None) is None


def test_the_peak_of_memory_begins_anew():
    torch.ones(64 * 2**20)  # 256 MB, let go at once
    before = peak_memory()
    alignment_tables.forget_peak()
    assert peak_memory() < before - 128 * 2**20


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="steps is 0"):
        Settings(steps=0)
    with pytest.raises(ConfigError, match="unknown table"):
        table_of("table3", Settings())
