"""``UNet2DConditionModel`` as one flat chain of layers: every resnet (with its attention) and every resampler is a cut.

The way down leaves each layer's output on a stack of skips, the way up takes them back, newest first. Running the
chain is the upstream ``forward`` between ``conv_in`` and ``conv_norm_out``, operation for operation.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from stitchvm.core import ConfigError

_PLAIN: dict[str, Any] = {
    "center_input_sample": False,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "attention_type": "default",
}
"""What a text-to-image UNet has; another value needs an input that no pipeline here gives (GLIGEN, IP-Adapter, ...)."""

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D")

_FREEU = ("s1", "s2", "b1", "b2")


@attrs.define(eq=False)  # not frozen: torch.compile cannot follow how attrs writes a frozen instance
class UNetState:
    """Between two layers: ``sample [B, C, h, w]``, the ``skips`` not yet taken back (newest last), ``temb [B, E]`` and
    ``text [B, T, D]``.

    ``temb`` embeds time and, for SDXL, pooled text and image sizes.
    """

    sample: Tensor
    skips: tuple[Tensor, ...]
    temb: Tensor
    text: Tensor


@attrs.frozen
class Layer:
    """One link of the chain: dotted paths of its ``modules`` in running order, a resnet and its attention or one
    resampler.

    A layer on the way down ``pushes`` its output on the skips; a resnet on the way up ``pops`` the newest.
    """

    modules: tuple[str, ...]
    pushes: bool = False
    pops: bool = False


def chain(net: UNet2DConditionModel) -> tuple[Layer, ...]:
    """The layers of a whole network in running order.

    Raises :class:`ConfigError` for a variant that reads more than latents, time and text, or has other blocks than
    SD's.
    """
    _check(net)
    layers: list[Layer] = []
    for k, block in enumerate(net.down_blocks):
        layers += (Layer(modules, pushes=True) for modules in _pairs(block, f"down_blocks.{k}"))
        layers += (Layer(modules, pushes=True) for modules in _each(block, f"down_blocks.{k}", "downsamplers"))
    if net.mid_block is not None:
        layers += (Layer(modules) for modules in _pairs(net.mid_block, "mid_block"))
    for k, block in enumerate(net.up_blocks):
        layers += (Layer(modules, pops=True) for modules in _pairs(block, f"up_blocks.{k}"))
        layers += (Layer(modules) for modules in _each(block, f"up_blocks.{k}", "upsamplers"))
    return tuple(layers)


def run_layer(net: UNet2DConditionModel, layer: Layer, state: UNetState) -> UNetState:
    """The state after ``layer``."""
    sample, skips = state.sample, state.skips
    if layer.pops:
        *rest, skip = skips
        sample = torch.cat(_freed(net.get_submodule(layer.modules[0].rsplit(".", 2)[0]), sample, skip), dim=1)
        skips = tuple(rest)
    for path in layer.modules:
        module, kind = net.get_submodule(path), path.split(".")[-2]
        if kind == "resnets":
            sample = module(sample, state.temb)
        elif kind == "attentions":
            sample = module(sample, encoder_hidden_states=state.text, return_dict=False)[0]
        elif kind == "downsamplers":
            sample = module(sample)
        else:
            # The next skip's size: twice this one's, or one less where a side was odd on the way down.
            sample = module(sample, skips[-1].shape[-2:])
    return UNetState(sample, (*skips, sample) if layer.pushes else skips, state.temb, state.text)


def _pairs(block: Any, path: str) -> list[tuple[str, ...]]:
    """Every resnet of a block with the attention that follows it, where one does."""
    attentions = len(getattr(block, "attentions", ()))
    return [
        (f"{path}.resnets.{k}", f"{path}.attentions.{k}") if k < attentions else (f"{path}.resnets.{k}",)
        for k in range(len(block.resnets))
    ]


def _each(block: Any, path: str, name: str) -> list[tuple[str, ...]]:
    return [(f"{path}.{name}.{k}",) for k in range(len(getattr(block, name) or ()))]


def _freed(block: nn.Module, sample: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """``(sample, skip)`` reweighted where the pipeline has FreeU switched on, as they are where it has not."""
    settings = {name: getattr(block, name, None) for name in _FREEU}
    if not all(settings.values()):
        return sample, skip
    # Upstream writes into the sample, which is still the state of the cut before.
    freed: tuple[Tensor, Tensor] = apply_freeu(block.resolution_idx, sample.clone(), skip, **settings)
    return freed


def _check(net: UNet2DConditionModel) -> None:
    config = net.config
    odd = [f"{name} = {config[name]!r}" for name, plain in _PLAIN.items() if config[name] != plain]
    if config.addition_embed_type not in (None, "text_time"):
        odd.append(f"addition_embed_type = {config.addition_embed_type!r}")
    if not isinstance(config.cross_attention_dim, int):
        odd.append(f"cross_attention_dim = {config.cross_attention_dim!r}")
    if config.in_channels != config.out_channels:
        odd.append(f"in_channels = {config.in_channels} with out_channels = {config.out_channels}")
    mid = [net.mid_block] if net.mid_block is not None else []
    kinds = {type(block).__name__ for block in (*net.down_blocks, *mid, *net.up_blocks)}
    odd += [f"a {kind}" for kind in sorted(kinds - set(_BLOCKS))]
    if odd:
        raise ConfigError(
            f"this UNet is no plain text-to-image UNet: it has {', '.join(odd)}. Expected one of the kind of "
            "Stable Diffusion 1, 2 or XL; inpainting, GLIGEN, IP-Adapter and class-conditional variants cannot be cut."
        )
