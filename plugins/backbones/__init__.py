"""Built-in backbone families."""

from __future__ import annotations

from collections.abc import Iterable

from stitchvm.core import BackboneRecord, Family, hookimpl


@hookimpl
def stitchvm_backbones() -> Iterable[Family | BackboneRecord]:
    """The families that ``registry.toml`` gives names to."""
    yield Family(
        kind="backbone",
        name="mmdit",
        load="stitchvm.plugins.backbones.mmdit:MMDiTBackbone",
        spec_version=1,
        requires=("diffusers", "transformers"),
        install="stitchvm[sd3]",
        pipelines=("StableDiffusion3Pipeline",),
        description="Stable Diffusion 3 and 3.5: diffusers' SD3Transformer2DModel with its VAE and text encoders.",
    )
    yield Family(
        kind="backbone",
        name="flux",
        load="stitchvm.plugins.backbones.flux:FluxBackbone",
        spec_version=1,
        requires=("diffusers", "transformers"),
        install="stitchvm[flux]",
        pipelines=("FluxPipeline",),
        description="FLUX.1: diffusers' FluxTransformer2DModel with its VAE and text encoders.",
    )
    yield Family(
        kind="backbone",
        name="unet",
        load="stitchvm.plugins.backbones.unet:UNetBackbone",
        spec_version=1,
        requires=("diffusers", "transformers"),
        install="stitchvm[sd]",
        pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        description="Stable Diffusion 1.5, 2 and XL: diffusers' UNet2DConditionModel with its VAE and text encoders.",
    )
