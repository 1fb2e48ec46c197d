"""Every model of the small world keeps what StitchVM's core relies on, as any third party's would."""

from __future__ import annotations

import pytest

from stitchvm import core
from stitchvm.core.testing import checks_for, examine

NAMES = [
    record.name
    for record in (*core.registry().backbones.values(), *core.registry().rewards.values())
    if record.source is not None and record.source.distribution == "stitchvm-shapes"
]
LOCAL = {"twin", "geometry"}
"""What a record with local weights may leave to them."""
BY_CONDITION = {"prompts": {"no-text"}, "images": {"text"}, "nothing": {"text", "reads-condition"}}


def test_the_world_has_backbones_and_rewards():
    assert {"shapes-mmdit", "shapes-clip"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_conforms(name):
    report = examine(name)
    assert [failure.message for failure in report.failures] == []
    assert len(report.results) == len(checks_for(report.kind))
    silent = {result.check for result in report.results if result.status == "not applicable"} - LOCAL
    if report.kind == "backbone":
        assert silent == set()
    else:
        assert silent == BY_CONDITION[core.load_reward(name).condition_kind]
