"""Without a value the clean reward of finished samples is maximised, and nothing else in its place."""

from __future__ import annotations

import pytest

import families
from stitchvm import core
from stitchvm.core import ConfigError
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo

PLAN = {"updates": 1, "prompts_per_update": 1, "lora": {"rank": 2, "alpha": 4}, "tracker": None}


def train(method, out, value=None):
    return core.train(method, families.mmdit(), value, ["a red ball"], out=out, training=PLAN, reward=families.clip(),
                      steps=3, progress=False)  # fmt: skip


@pytest.mark.parametrize("method", [Draft, DiffusionNft, DiffusionDpo, FlowGrpo])
def test_a_stop_before_the_end_needs_a_value_to_be_read_there(method, tmp_path):
    for stop in ((2, 2), (2, 3)):
        with pytest.raises(ConfigError, match="no value was given.*--value DIR.*--estimator tweedie"):
            train(method(samples_per_prompt=2, stop=stop), tmp_path)
    assert not (tmp_path / "train.json").exists()
    stopped = train(method(samples_per_prompt=2, stop=(2, 2)), tmp_path / "asked", "tweedie")
    finished = train(method(samples_per_prompt=2, stop=(3, 3)), tmp_path / "finished")
    assert [one.record.history[0].get("stop") for one in (stopped, finished)] == [2.0, 3.0]
