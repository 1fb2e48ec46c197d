"""Stable Diffusion 3 and 3.5: diffusers' ``SD3Transformer2DModel``, cut after any of its joint blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import attrs
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

from stitchvm.core import (
    Backbone,
    BackboneRecord,
    Condition,
    ConfigError,
    FlowPath,
    NoisyLatent,
    SliceError,
    WeightsError,
)

from .companions import Companions, HashedText, Sd3Text
from .folders import fetcher, load_part, on_meta, open_sd3_text, open_vae, random_vae, read_config

TIME_SCALE = 1000.0
"""SD3's network reads its time as ``sigma * 1000``."""

_CLIP_TOKENS = 77
"""What the two CLIP text encoders contribute, in front of T5's ``max_sequence_length``."""


@attrs.frozen(eq=False)
class MMDiTState:
    """Between two blocks: ``image [B, rows * columns, C]`` and ``context [B, T, C]`` tokens, ``temb [B, C]``.

    ``temb`` embeds time and pooled text. The last block drops the context, which is then None.
    """

    image: Tensor
    context: Tensor | None
    temb: Tensor
    rows: int
    columns: int


@attrs.frozen
class MMDiTArchitecture:
    """What :meth:`MMDiTBackbone.build` takes: the settings of ``SD3Transformer2DModel``, ``AutoencoderKL`` and
    ``FlowMatchEulerDiscreteScheduler``, and how many tokens the third text encoder (T5) reads.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any] = attrs.field(factory=lambda: {"shift": 3.0})
    max_sequence_length: int = 256


class MMDiTBackbone(Backbone):
    """A :class:`Backbone` over ``SD3Transformer2DModel``; its condition is ``{"embeds": [B, T, D], "pooled": [B, P]}``.

    ``companions`` hold the VAE, the scheduler's settings and the text side. ``native_resolution`` is in pixels.
    """

    net: SD3Transformer2DModel
    companions: Companions
    path = FlowPath()
    prediction = "velocity"

    def __init__(
        self,
        net: SD3Transformer2DModel,
        companions: Companions,
        *,
        native_resolution: int | None = None,
        text_tokens: int,
    ) -> None:
        super().__init__(net)
        self.companions = companions
        self.latent_channels = net.config.in_channels
        self.latent_factor = companions.latent_factor
        self.native_resolution = native_resolution or net.config.sample_size * self.latent_factor
        self._text_tokens = text_tokens

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("pos_embed", "time_text_embed", "context_embedder")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{k}" for k in range(self.net.config.num_layers))

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("norm_out", "proj_out")

    def stem(self, x: NoisyLatent, condition: Condition) -> MMDiTState:
        """Patches with their positions, the embedded text, and the modulation vector of time and pooled text."""
        net, dtype, batch = self.net, self.dtype, len(x.latents)
        self._check(x, condition)
        text = condition.expand(batch).to(x.latents.device, dtype)
        image = net.pos_embed(x.latents.to(dtype)).contiguous()
        temb = net.time_text_embed(x.sigma * TIME_SCALE, text["pooled"])
        rows, columns = (side // net.config.patch_size for side in x.latents.shape[-2:])
        return MMDiTState(image, net.context_embedder(text["embeds"]), temb, rows, columns)

    def block(self, k: int, state: MMDiTState) -> MMDiTState:
        context, image = self.net.transformer_blocks[k - 1](
            hidden_states=state.image, encoder_hidden_states=state.context, temb=state.temb
        )
        return attrs.evolve(state, image=image, context=context)

    def exit(self, state: MMDiTState) -> Tensor:
        """The velocity ``[B, C, h, w]``: norm, projection, and the patches put back in place."""
        net, size = self.net, self.net.config.patch_size
        tokens = net.proj_out(net.norm_out(state.image, state.temb))
        patches = tokens.reshape(len(tokens), state.rows, state.columns, size, size, net.out_channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(
            len(tokens), net.out_channels, state.rows * size, state.columns * size
        )

    def grid(self, state: MMDiTState) -> Tensor:
        return state.image.transpose(1, 2).reshape(len(state.image), -1, state.rows, state.columns)

    def example(self, batch: int = 1) -> tuple[NoisyLatent, Condition]:
        config, side = self.net.config, self.native_resolution // self.latent_factor
        zeros = partial(torch.zeros, device=self.device)
        text = {
            "embeds": zeros(batch, self._text_tokens, config.joint_attention_dim),
            "pooled": zeros(batch, config.pooled_projection_dim),
        }
        return NoisyLatent(zeros(batch, self.latent_channels, side, side), zeros(batch)), Condition(text)

    def _check(self, x: NoisyLatent, condition: Condition) -> None:
        """Raise :class:`SliceError` for what upstream would answer with a bare reshape or matmul error."""
        config = self.net.config
        largest = config.patch_size * config.pos_embed_max_size
        if any(side % config.patch_size or side > largest for side in x.latents.shape[-2:]):
            raise SliceError(
                f"latent sides must be multiples of {config.patch_size} and at most {largest}, got "
                f"{list(x.latents.shape[-2:])}; that is {config.patch_size * self.latent_factor} to "
                f"{largest * self.latent_factor} image pixels."
            )
        widths = {"embeds": config.joint_attention_dim, "pooled": config.pooled_projection_dim}
        given = {name: tensor.shape[-1] for name, tensor in condition.tensors.items()}
        if given != widths:
            raise SliceError(f"an MMDiT reads prompt embeddings of widths {widths}, got {given}; use encode_prompts.")

    # -- latents, text, time ------------------------------------------------------------------------------------------

    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        patch = self.net.config.patch_size
        return self.companions.sigmas(steps, (latent_shape[0] // patch) * (latent_shape[1] // patch))

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompt embeddings, one sample a prompt: as the pipeline's ``encode_prompt`` gives them, without guidance.

        Raises :class:`ConfigError` for an empty list or a bare string.
        """
        if not isinstance(prompts, list) or not prompts:
            raise ConfigError(f"encode_prompts takes a list of at least one prompt, got {prompts!r}.")
        return Condition(self.companions.text(list(prompts), self.device))

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to scaled latents (the posterior's mode), float32.

        Raises :class:`SliceError` unless the sides are multiples of a patch's pixels.
        """
        return self.companions.encode_images(images, self.device, self.latent_factor * self.net.config.patch_size)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.companions.decode_latents(latents, self.device)

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """A frozen backbone with random weights from torch's generator, or without any on the meta device.

        ``architecture``: see :class:`MMDiTArchitecture`. Its text side is :class:`HashedText`. Raises
        :class:`ConfigError` for an unknown or missing setting.
        """
        try:
            settings = MMDiTArchitecture(**architecture)
            with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
                net = SD3Transformer2DModel(**settings.transformer).requires_grad_(False)
            vae = on_meta(partial(AutoencoderKL, **settings.vae))
            scheduler = FlowMatchEulerDiscreteScheduler(**settings.scheduler)
        except TypeError as error:
            raise ConfigError(f"not an MMDiT architecture: {error}.") from error
        tokens, config = _CLIP_TOKENS + settings.max_sequence_length, net.config
        companions = Companions(
            vae_config=dict(vae.config),
            scheduler_config=dict(scheduler.config),
            text=HashedText(tokens, config.joint_attention_dim, config.pooled_projection_dim),
            open_vae=partial(random_vae, settings.vae, seed=int(torch.randint(2**31, ()))),
        )
        return cls(net.to(device), companions, text_tokens=tokens).eval()

    @classmethod
    def from_pretrained(
        cls,
        record: BackboneRecord,
        *,
        cut: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The backbone of a diffusers folder or hub repository, frozen, in ``dtype`` (the record's when None).

        With a ``cut`` only the head up to that block is read from disk (the stem for ``LATENT``). VAE and text encoders
        are fetched and read when they are first used. Raises :class:`WeightsError` for a checkpoint that is missing,
        gated, incomplete, truncated or of another architecture than the record's.
        """
        fetch, expected = fetcher(record, token, local_files_only), record.architecture
        root, precision = fetch("*.json"), dtype or getattr(torch, record.dtype)
        config = read_config(root / "transformer", SD3Transformer2DModel, expected.get("transformer", {}))
        vae_config = read_config(root / "vae", AutoencoderKL, expected.get("vae", {}))
        length = int(expected.get("max_sequence_length", 256))
        backbone = cls(
            on_meta(partial(SD3Transformer2DModel.from_config, config)),
            Companions(
                vae_config=vae_config,
                scheduler_config=read_config(root / "scheduler", FlowMatchEulerDiscreteScheduler, {}),
                text=Sd3Text(partial(open_sd3_text, fetch, config["joint_attention_dim"], precision), length),
                open_vae=partial(open_vae, fetch, vae_config),
            ),
            native_resolution=record.resolution,
            text_tokens=_CLIP_TOKENS + length,
        ).eval()
        if cut is None:
            load_part(fetch, backbone.net, "transformer", dtype=precision, device=device)
            return backbone
        backbone.check_cut(cut)
        part = backbone.prune(0, max(cut, 0))
        part.companions = backbone.companions
        prefixes = backbone.tensor_prefixes(0, max(cut, 0))
        load_part(fetch, part.net, "transformer", prefixes=prefixes, dtype=precision, device=device)
        return part

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, max_sequence_length: int = 256) -> Self:
        """The backbone of a loaded ``StableDiffusion3Pipeline``, sharing its modules and leaving them as they are.

        ``max_sequence_length`` is the T5 token count that ``pipeline`` is called with. Raises :class:`WeightsError` for
        another kind of pipeline, or one without its VAE.
        """
        net, vae = getattr(pipeline, "transformer", None), getattr(pipeline, "vae", None)
        if not isinstance(net, SD3Transformer2DModel) or not isinstance(vae, AutoencoderKL):
            raise WeightsError(
                f"{type(pipeline).__name__} has no SD3Transformer2DModel with an AutoencoderKL; "
                "give a StableDiffusion3Pipeline with both."
            )
        companions = Companions(
            vae_config=dict(vae.config),
            scheduler_config=dict(pipeline.scheduler.config),
            text=Sd3Text(lambda: pipeline, max_sequence_length),
            open_vae=lambda: vae,
        )
        return cls(net, companions, text_tokens=_CLIP_TOKENS + max_sequence_length)
