"""Whether what one backbone samples can be read by a value model that was stitched to another."""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone
from .loading import load_backbone
from .records import name_of
from .seeds import stream_seed
from .slicing import LATENT

SAME_PICTURE = 0.02
"""How far two decodings of one latent may lie apart, root mean square of pixels in [0, 1]. One autoencoder in bfloat16
and in float32: under 0.002 on the small world's; another one: beyond 0.1."""

SAME_TEXT = 0.1
"""The same of prompt embeddings, relative to their own root mean square: under 0.01 for text encoders in bfloat16."""

COMPARED_SIDE = 16
"""Latent pixels along the side of what is decoded to compare autoencoders: full-size decodings say no more."""


@torch.no_grad()
def misfit(source: Backbone, steered: Backbone, prompted: bool = False) -> str | None:
    """Why a value model stitched to ``source`` cannot read the latents that ``steered`` samples, or None if it can.

    Both must live on the same path and have the same latents: as many channels, as many pixels to one, and the same
    picture for the same latent. A ``prompted`` one also reads the sampler's prompt, which both must encode alike.
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
    side = min(source.native_resolution // source.latent_factor, COMPARED_SIDE)
    noise = torch.randn(1, steered.latent_channels, side, side, generator=torch.Generator().manual_seed(stream_seed(0)))
    shown, other = (one.decode_latents(noise.to(one.device)).clamp(0, 1) for one in (source, steered))
    if not _alike(shown, other, SAME_PICTURE):
        return f"the autoencoders of {left} and {right} decode one latent to different pictures"
    read, meant = (one.encode_prompts(["a prompt"]).tensors if prompted else {} for one in (source, steered))
    if read.keys() != meant.keys() or not all(_alike(t, meant[n], SAME_TEXT * _size(t)) for n, t in read.items()):
        return f"the value model reads prompts as {left} encodes them, and {right} encodes them otherwise"
    return None


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
