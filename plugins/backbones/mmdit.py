"""Stable Diffusion 3 and 3.5: diffusers' ``SD3Transformer2DModel``, cut after any of its joint blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from stitchvm.core import Condition, NoisyLatent

from .companions import Companions, Sd3Text, TextSide
from .flow_transformer import FlowTransformer, TokenState
from .folders import Fetch, open_sd3_text

TIME_SCALE = 1000.0
"""SD3's network reads its time as ``sigma * 1000``."""


@attrs.frozen
class MMDiTArchitecture:
    """What :meth:`MMDiTBackbone.build` takes: the settings of ``SD3Transformer2DModel``, ``AutoencoderKL`` and
    ``FlowMatchEulerDiscreteScheduler``, and how many tokens the third text encoder (T5) reads.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any] = attrs.field(factory=lambda: {"shift": 3.0})
    max_sequence_length: int = 256


class MMDiTBackbone(FlowTransformer):
    """A :class:`FlowTransformer` over ``SD3Transformer2DModel``; both CLIP encoders' 77 tokens come before T5's."""

    network = SD3Transformer2DModel
    pipeline = "StableDiffusion3Pipeline"
    architecture = MMDiTArchitecture
    leading_tokens = 77

    net: SD3Transformer2DModel

    def __init__(
        self,
        net: SD3Transformer2DModel,
        companions: Companions,
        *,
        native_resolution: int | None = None,
        max_sequence_length: int,
    ) -> None:
        super().__init__(net, companions, max_sequence_length=max_sequence_length)
        self.latent_channels, self.patch = net.config.in_channels, net.config.patch_size
        self.native_resolution = native_resolution or net.config.sample_size * self.latent_factor

    @classmethod
    def text_of_folder(cls, fetch: Fetch, config: Mapping[str, Any], length: int, dtype: torch.dtype) -> TextSide:
        return Sd3Text(partial(open_sd3_text, fetch, config["joint_attention_dim"], dtype), length)

    @classmethod
    def text_of_pipeline(cls, pipeline: Any, length: int) -> TextSide:
        return Sd3Text(lambda: pipeline, length)

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("pos_embed", "time_text_embed", "context_embedder")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{k}" for k in range(self.net.config.num_layers))

    def stem(self, x: NoisyLatent, condition: Condition) -> TokenState:
        """Patches with their positions, the embedded text, and the modulation vector of time and pooled text."""
        net, dtype, batch = self.net, self.dtype, len(x.latents)
        self.check_input(x, condition, largest=self.patch * net.config.pos_embed_max_size)
        text = {name: t.to(dtype) for name, t in condition.tensors_for(batch, x.latents.device).items()}
        image = net.pos_embed(x.latents.to(dtype)).contiguous()
        temb = net.time_text_embed(x.sigma * TIME_SCALE, text["pooled"])
        rows, columns = (side // self.patch for side in x.latents.shape[-2:])
        return TokenState(image, net.context_embedder(text["embeds"]), temb, rows, columns)

    def block(self, k: int, state: TokenState) -> TokenState:
        context, image = self.net.transformer_blocks[k - 1](
            hidden_states=state.image, encoder_hidden_states=state.context, temb=state.temb
        )
        return attrs.evolve(state, image=image, context=context)

    def exit(self, state: TokenState) -> Tensor:
        """The velocity ``[B, C, h, w]``: norm, projection, and the patches put back in place."""
        net, size = self.net, self.patch
        tokens = net.proj_out(net.norm_out(state.image, state.temb))
        patches = tokens.reshape(len(tokens), state.rows, state.columns, size, size, net.out_channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(
            len(tokens), net.out_channels, state.rows * size, state.columns * size
        )

    def upstream(self, x: NoisyLatent, condition: Condition) -> Tensor:
        output: Tensor = self.net(
            hidden_states=x.latents,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            timestep=x.sigma * TIME_SCALE,
        ).sample
        return output
