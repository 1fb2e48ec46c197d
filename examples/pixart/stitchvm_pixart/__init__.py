"""A plugin of StitchVM's: the families ``pixart`` (a backbone) and ``convnext`` (a reward), and models of both.

Nothing heavy is imported here: what ``load`` names is, when a model is first used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stitchvm.core import BackboneRecord, Family, RewardRecord, hookimpl


@hookimpl
def stitchvm_backbones() -> Iterable[Family | BackboneRecord]:
    """PixArt's family; its models are in the registry file."""
    yield Family(
        kind="backbone",
        name="pixart",
        load="stitchvm_pixart.backbone:PixArtBackbone",
        spec_version=1,
        requires=("diffusers", "transformers"),
        install="stitchvm-pixart-example",
        description="PixArt-Sigma and PixArt-Alpha: diffusers' PixArtTransformer2DModel with its VAE and T5.",
    )


@hookimpl
def stitchvm_rewards() -> Iterable[Family | RewardRecord]:
    """The ConvNeXt classifiers' family; its models are in the registry file."""
    yield Family(
        kind="reward",
        name="convnext",
        load="stitchvm_pixart.convnext:ConvNextReward",
        spec_version=1,
        requires=("timm",),
        install="stitchvm-pixart-example",
        lacks={"positions": "convolutions know where they are; there is no table of positions to add"},
        description="How sure a ConvNeXt classifier of timm's is that an image shows one class.",
    )


@hookimpl
def stitchvm_registries() -> Iterable[Path]:
    """The models' names."""
    yield Path(__file__).parent / "registry.toml"
