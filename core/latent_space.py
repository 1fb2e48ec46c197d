"""Whether what one backbone samples can be read by a value model that was stitched to another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .backbone import Backbone
from .loading import load_backbone
from .records import name_of
from .seeds import stream_seed
from .slicing import LATENT

SAME_PICTURE = 0.02
"""How far two decodings of one latent may lie apart, root mean square of pixels in [0, 1]. One autoencoder in bfloat16
and in float32: under 0.002 on the small world's; another one: beyond 0.1."""

SAME_LATENT = 0.1
"""The same of two encodings of one picture, relative to their own root mean square. One encoder in bfloat16: 0.004 on
the small world's; another one: beyond 1."""

SAME_TEXT = 0.1
"""The same of prompt embeddings, relative to their own root mean square: under 0.01 for text encoders in bfloat16."""

COMPARED_SIDE = 16
"""Latent pixels along the side of what is decoded to compare autoencoders: full-size decodings say no more."""


@torch.no_grad()
def misfit(source: Backbone, steered: Backbone, prompted: bool = False) -> str | None:
    """Why a value model stitched to ``source`` cannot read the latents that ``steered`` samples, or None if it can.

    Both must live on the same path and have the same latents: as many channels, as many pixels to one, and the same
    picture for the same latent, or (a finetuned decoder) the same latent for the same picture. A ``prompted`` one also
    reads the sampler's prompt, which both must encode alike.
    ``source`` may be a value model's head: where that left its autoencoder behind, the registered model's is opened
    anew. Networks that share tensors or a record have the same one, and nothing is opened.

    Raises ``WeightsError`` where the autoencoder or text encoders of ``source`` cannot be opened.
    """
    left, right = name_of(source), name_of(steered)
    if source.path.name != steered.path.name:
        return (
            f"{left} lives on the {source.path.name} path and {right} on the {steered.path.name} path, "
            "so a latent at one noise level is not the other's"
        )
    for what, of in (("latent channels", "latent_channels"), ("pixels a latent pixel", "latent_factor")):
        if (ours := getattr(source, of)) != (theirs := getattr(steered, of)):
            return f"{left} has {ours} {what} and {right} has {theirs}"
    if _is_same_model(source, steered):
        return None
    if source.companions is None and source.record is not None:
        source = load_backbone(source.record, cut=LATENT)
    if not _same_autoencoder(source, steered):
        return f"the autoencoders of {left} and {right} decode one latent to different pictures"
    read, meant = (one.encode_prompts(["a prompt"]).tensors if prompted else {} for one in (source, steered))
    if read.keys() != meant.keys() or not all(_alike(t, meant[n], SAME_TEXT * _size(t)) for n, t in read.items()):
        return f"the value model reads prompts as {left} encodes them, and {right} encodes them otherwise"
    return None


def pipeline_misfit(source: Backbone, pipeline: Any) -> str | None:
    """Why a value model stitched to ``source`` cannot read the latents of a diffusers pipeline, None if nothing tells.

    Told by the scale of its ``AutoencoderKL``'s latents, which families of models do not share, and finetuned decoders
    keep. Nothing is run or moved, so that it may be offloaded. Other autoencoders' settings say nothing of the kind.
    """
    vae: Any = getattr(pipeline, "vae", None)
    vae = getattr(vae, "_orig_mod", vae)  # inside torch.compile's
    if source.latent_scale is None or "AutoencoderKL" not in (cls.__name__ for cls in type(vae).__mro__):
        return None
    ours, theirs = source.latent_scale, (vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0)
    if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(ours, theirs, strict=True)):
        return None
    own, its = (f"{scale:g} (shift {shift:g})" for scale, shift in (ours, theirs))
    return f"the autoencoder of {name_of(source)} scales its latents by {own}, the pipeline's by {its}"


def _same_autoencoder(source: Backbone, steered: Backbone) -> bool:
    """By what both decode a latent to or, where that differs, what they encode a picture to."""
    side = min(source.native_resolution // source.latent_factor, COMPARED_SIDE)
    generator = torch.Generator().manual_seed(stream_seed(0))
    noise = torch.randn(1, steered.latent_channels, side, side, generator=generator)
    shown, other = (one.decode_latents(noise.to(one.device)).clamp(0, 1) for one in (source, steered))
    if _alike(shown, other, SAME_PICTURE):
        return True
    blots = torch.rand(1, 3, side // 2, side // 2, generator=generator)
    picture = functional.interpolate(blots, scale_factor=2 * source.latent_factor, mode="bilinear")
    read, meant = (one.encode_images(picture.to(one.device)) for one in (source, steered))
    return _alike(read, meant, SAME_LATENT * _size(meant))


def _is_same_model(source: Backbone, steered: Backbone) -> bool:
    """One registered model, or a network and a part, policy or twin of it: over the very same tensors."""
    if source.record is not None and source.record == steered.record:
        return True
    ours = {id(parameter) for parameter in source.net.parameters()}
    return any(id(parameter) in ours for parameter in steered.net.parameters())


def _alike(one: Tensor, other: Tensor, within: float) -> bool:
    """Whether the root mean square of the difference is at most ``within``."""
    return one.shape == other.shape and _size(one.float().cpu() - other.float().cpu()) <= within


def _size(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
