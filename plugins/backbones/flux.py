"""FLUX.1: diffusers' ``FluxTransformer2DModel``, cut after any of its double or single blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from stitchvm.core import Condition, ConfigError, NoisyLatent, Sliced

from .companions import Companions, FluxText, TextSide
from .flow_transformer import FlowTransformer, TokenState
from .folders import Fetch, open_flux_text

GUIDANCE = 3.5
"""The guidance that ``FluxPipeline`` embeds unless it is told another."""

PATCH = 2
"""Latent pixels along the side of a token: the pipeline packs latents before the network sees them."""

TIME_SCALE = 1000.0
"""The network's forward multiplies time and guidance by this, in the latents' precision."""


@attrs.define(eq=False)  # not frozen: torch.compile cannot follow how attrs writes a frozen instance
class FluxState(TokenState):
    """A :class:`TokenState` with the rotary embedding ``(cos, sin)``, each ``[T + rows * columns, head width]``, text
    first."""

    rotary: tuple[Tensor, Tensor]


@attrs.frozen
class FluxArchitecture:
    """What :meth:`FluxBackbone.build` takes: the settings of ``FluxTransformer2DModel``, ``AutoencoderKL`` and
    ``FlowMatchEulerDiscreteScheduler``, how many tokens T5 reads, the native latent side (``sample_size``), and the
    embedded ``guidance`` (see :class:`FluxBackbone`).
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any] = attrs.field(factory=lambda: {"use_dynamic_shifting": True, "shift": 3.0})
    max_sequence_length: int = 512
    sample_size: int = 128
    guidance: float | None = None


class FluxBackbone(FlowTransformer):
    """A :class:`FlowTransformer` over ``FluxTransformer2DModel``: double blocks first, then single ones, in one chain.

    ``guidance`` is the guidance scale that a guidance-distilled network (FLUX.1 dev) reads beside its time: it is part
    of every pass, under the null prompt too, and asks for no second pass. :data:`GUIDANCE` when None; a network without
    guidance embedding (FLUX.1 schnell) has none. It is a setting of the backbone, from its record's ``architecture``,
    and ``with_embedded_guidance`` gives a twin at another. A value model's head goes on reading the one that it was
    stitched at. Neither network takes classifier-free guidance (a ``guidance_scale`` other than 1).

    Raises :class:`ConfigError` for a guidance that the network cannot read, and for a network that reads or predicts
    more than the latents (FLUX.1 Fill, Canny, Depth).
    """

    network = FluxTransformer2DModel
    pipeline = "FluxPipeline"
    architecture = FluxArchitecture
    options = ("guidance", "sample_size")
    uniform_levels = True
    guided_passes = 1
    unbatched_state = ("rotary",)

    net: FluxTransformer2DModel

    def __init__(
        self,
        net: FluxTransformer2DModel,
        companions: Companions,
        *,
        native_resolution: int | None = None,
        max_sequence_length: int,
        sample_size: int = 128,
        guidance: float | None = None,
    ) -> None:
        super().__init__(net, companions, max_sequence_length=max_sequence_length)
        config, self.latent_channels = net.config, int(companions.vae_config["latent_channels"])
        packed = self.latent_channels * PATCH**2
        if (config.patch_size, config.in_channels, net.out_channels) != (1, packed, packed):
            raise ConfigError(
                f"the transformer reads {config.in_channels} and predicts {net.out_channels} channels in patches of "
                f"{config.patch_size}, expected {packed}, {packed} and 1 for latents of {self.latent_channels} "
                "channels; a FLUX that reads more than the latents (Fill, Canny, Depth) cannot be used here."
            )
        if guidance is not None and not config.guidance_embeds:
            raise ConfigError(f"guidance is {guidance}, but this FLUX has no guidance embedding; leave it out.")
        self.guidance = (GUIDANCE if guidance is None else float(guidance)) if config.guidance_embeds else None
        self.patch = PATCH
        self.native_resolution = native_resolution or sample_size * self.latent_factor

    @classmethod
    def text_of_folder(cls, fetch: Fetch, config: Mapping[str, Any], length: int, dtype: torch.dtype) -> TextSide:
        return FluxText(partial(open_flux_text, fetch, dtype), length)

    @classmethod
    def text_of_pipeline(cls, pipeline: Any, length: int) -> TextSide:
        return FluxText(lambda: pipeline, length)

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("x_embedder", "time_text_embed", "context_embedder", "pos_embed")

    @property
    def block_modules(self) -> tuple[str, ...]:
        config = self.net.config
        double = (f"transformer_blocks.{k}" for k in range(config.num_layers))
        return (*double, *(f"single_transformer_blocks.{k}" for k in range(config.num_single_layers)))

    def stem(self, x: NoisyLatent, condition: Condition) -> FluxState:
        """Packed latents and text, embedded, their rotary positions, and the modulation vector of time, guidance and
        pooled text."""
        net, dtype, batch = self.net, self.dtype, len(x.latents)
        self.check_input(x, condition)
        text = {name: t.to(dtype) for name, t in condition.tensors_for(batch, x.latents.device).items()}
        packed = F.pixel_unshuffle(x.latents.to(dtype), PATCH)
        rows, columns = packed.shape[-2:]
        image = net.x_embedder(packed.flatten(2).transpose(1, 2).contiguous())
        # In the network's precision before the scale, as upstream casts them: bfloat16 rounds 0.3 to 0.30078.
        levels = [x.sigma.to(dtype) * TIME_SCALE]
        if self.guidance is not None:
            levels.append(torch.full_like(x.sigma, self.guidance).to(dtype) * TIME_SCALE)
        temb = net.time_text_embed(*levels, text["pooled"])
        rotary = net.pos_embed(_positions(text["embeds"].shape[1], rows, columns).to(image))
        return FluxState(image, net.context_embedder(text["embeds"]), temb, rows, columns, rotary)

    def block(self, k: int, state: FluxState) -> FluxState:
        net, double = self.net, self.net.config.num_layers
        block = net.transformer_blocks[k - 1] if k <= double else net.single_transformer_blocks[k - 1 - double]
        context, image = block(
            hidden_states=state.image,
            encoder_hidden_states=state.context,
            temb=state.temb,
            image_rotary_emb=state.rotary,
        )
        return attrs.evolve(state, image=image, context=context)

    def exit(self, state: FluxState) -> Tensor:
        """The velocity ``[B, C, h, w]``: norm, projection, and the tokens unpacked."""
        tokens = self.net.proj_out(self.net.norm_out(state.image, state.temb))
        packed = tokens.transpose(1, 2).unflatten(2, (state.rows, state.columns))
        return F.pixel_shuffle(packed, PATCH)

    def upstream(self, x: NoisyLatent, condition: Condition) -> Tensor:
        """The network on what the pipeline's own functions make of the latents."""
        from diffusers import FluxPipeline

        (batch, channels, height, width), like = x.latents.shape, (x.latents.device, x.latents.dtype)
        tokens = self.net(
            hidden_states=FluxPipeline._pack_latents(x.latents, batch, channels, height, width),
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            timestep=x.sigma,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, *like),
            txt_ids=x.latents.new_zeros(condition["embeds"].shape[1], 3),
            guidance=None if self.guidance is None else torch.full_like(x.sigma, self.guidance),
        ).sample
        factor = self.latent_factor
        output: Tensor = FluxPipeline._unpack_latents(tokens, height * factor, width * factor, factor)
        return output

    def shares_blocks(self, other: Sliced, cut: int) -> bool:
        """The same modules read other features at another guidance."""
        return getattr(other, "guidance", None) == self.guidance and super().shares_blocks(other, cut)

    # -- beside a pipeline --------------------------------------------------------------------------------------------

    def from_pipeline_latents(
        self, pipeline: Any, latents: Tensor, sigma: float, size: tuple[int, int] | None = None
    ) -> Tensor:
        """From the pipeline's tokens ``[B, rows * columns, 4 C]``."""
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        height, width = size or (side, side)
        rows, columns = (pixels // (self.latent_factor * PATCH) for pixels in (height, width))
        expected = [rows * columns, self.latent_channels * PATCH**2]
        if list(latents.shape[1:]) != expected:
            raise ConfigError(
                f"latents of {height} x {width} pixels are {expected[0]} tokens of {expected[1]} channels, but the "
                f"pipeline's are {list(latents.shape[1:])}. Give the height and width that the pipeline is called with."
            )
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)

    def to_pipeline_latents(self, pipeline: Any, latents: Tensor, sigma: float) -> Tensor:
        return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2).contiguous()


def _positions(text: int, rows: int, columns: int) -> Tensor:
    """``[text + rows * columns, 3]``: what the rotary embedding counts. Text is at 0, an image token at its (0, row,
    column), row by row."""
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return torch.cat([torch.zeros(text, 3), places])
