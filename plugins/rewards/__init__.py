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
    yield Family(
        kind="reward",
        name="siglip",
        load="stitchvm.plugins.rewards.siglip:SiglipReward",
        spec_version=1,
        requires=("open_clip", "timm", "transformers"),
        install="stitchvm[siglip]",
        description="Image-text similarity of a SigLIP: an open_clip model over timm's vision transformer.",
    )
    yield Family(
        kind="reward",
        name="hpsv2",
        load="stitchvm.plugins.rewards.hpsv2:Hpsv2Reward",
        spec_version=1,
        requires=("open_clip",),
        install="stitchvm[clip]",
        description="Human preference scores of a tuned CLIP ViT-H/14, which reads whole images between black bars.",
    )
    yield Family(
        kind="reward",
        name="aesthetic",
        load="stitchvm.plugins.rewards.aesthetic:AestheticReward",
        spec_version=1,
        requires=("open_clip",),
        install="stitchvm[clip]",
        description="A score of the image alone, from a small network over a CLIP's embedding.",
    )
    yield Family(
        kind="reward",
        name="dinov2",
        load="stitchvm.plugins.rewards.dinov2:Dinov2Reward",
        spec_version=1,
        requires=("timm",),
        install="stitchvm[dinov2]",
        description="Likeness to reference images, or a plain embedding, of a DINOv2 from timm.",
    )
