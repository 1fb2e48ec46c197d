"""Built-in reward families."""

from __future__ import annotations

from collections.abc import Iterable

from stitchvm.core import Family, RewardRecord, hookimpl


@hookimpl
def stitchvm_rewards() -> Iterable[Family | RewardRecord]:
    """The families that ``registry.toml`` gives names to."""
    yield Family(
        kind="reward",
        name="clip",
        load="stitchvm.plugins.rewards.clip:ClipReward",
        spec_version=1,
        requires=("open_clip",),
        install="stitchvm[clip]",
        description="Image-text similarity of a CLIP model with a plain vision transformer, as open_clip builds it.",
    )
