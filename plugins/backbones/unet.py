"""Stable Diffusion 1.5, 2 and XL: diffusers' ``UNet2DConditionModel``, cut after any of its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, Self, cast

import attrs
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from stitchvm.core import (
    Backbone,
    BackboneRecord,
    Condition,
    ConfigError,
    NoisyLatent,
    SliceError,
    VariancePreservingPath,
)

from ..checkpoints import read_json
from .companions import Companions, HashedText, SdText, SdxlText
from .discrete_time import DiscreteTime, pipeline_levels, unit_signal
from .folders import fetcher, fill, loaded_part, on_meta, open_clip_text, open_vae, random_vae, read_config
from .unet_layers import UNetState, chain, run_layer

TEXT_TOKENS = 77
"""What a CLIP text encoder reads."""

_TIME_IDS = 6
"""Original height and width, crop from the top and left, target height and width, in pixels."""

_STEM = ("conv_in", "time_proj", "time_embedding", "time_embed_act", "add_time_proj", "add_embedding")


@attrs.frozen
class UNetArchitecture:
    """What :meth:`UNetBackbone.build` takes: the settings of ``UNet2DConditionModel``, ``AutoencoderKL`` and
    ``DDIMScheduler``, the text encoders' token count, and whether SDXL's null prompt is zeros (as its pipeline has it).
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any] = attrs.field(factory=dict)
    text_tokens: int = TEXT_TOKENS
    force_zeros_for_empty_prompt: bool = True


class UNetBackbone(Backbone):
    """A :class:`Backbone` over ``UNet2DConditionModel``, whose blocks are its layers (``block_modules`` names them).

    The condition is ``{"embeds": [B, T, D]}``, and for SDXL ``"pooled": [B, P]`` and optionally ``"time_ids": [B, 6]``
    (original height and width, crop top and left, target height and width, in pixels). Without ``time_ids`` the image
    is taken to be uncropped and as large as the latents say.

    The network reads the scheduler's own discrete ``time``; the noise level is ``sigma = sqrt(1 - alpha_bar_t)``.
    ``companions`` hold the VAE, the scheduler's settings and the text side. ``native_resolution`` is in pixels.
    """

    net: UNet2DConditionModel
    companions: Companions
    component = "unet"
    path = VariancePreservingPath()

    def __init__(
        self,
        net: UNet2DConditionModel,
        companions: Companions,
        time: DiscreteTime,
        *,
        native_resolution: int | None = None,
        text_tokens: int = TEXT_TOKENS,
        zero_null: bool = True,
    ) -> None:
        super().__init__(net)
        self.companions = companions
        self.time = time
        self.prediction = time.prediction
        self.latent_channels = net.config.in_channels
        self.latent_factor, self.latent_scale = companions.latent_factor, companions.scale_and_shift
        self.native_resolution = native_resolution or net.config.sample_size * self.latent_factor
        self._layers = chain(net)
        self._text_tokens = text_tokens
        self._zero_null = zero_null and "pooled" in self.widths

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return tuple(name for name in _STEM if getattr(self.net, name, None) is not None)

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(layer.modules[0] for layer in self._layers)

    @property
    def block_parts(self) -> tuple[tuple[str, ...], ...]:
        return tuple(layer.modules for layer in self._layers)

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("conv_norm_out", "conv_act", "conv_out")

    @property
    def widths(self) -> dict[str, int]:
        """The last dimension of every tensor of prompt embeddings the network reads."""
        return _widths(self.net.config)

    def stem(self, x: NoisyLatent, condition: Condition) -> UNetState:
        """``conv_in``, which is the first skip, the prompt, and the embedded time (for SDXL, pooled text and sizes)."""
        net, dtype, batch = self.net, self.dtype, len(x.latents)
        self._check(x, condition)
        text = condition.tensors_for(batch, x.latents.device)
        embeds, latents = text["embeds"].to(dtype), x.latents.to(dtype)
        temb = net.time_embedding(net.get_time_embed(sample=latents, timestep=self.time.timestep(x.sigma)))
        if "pooled" in text:
            added = {"text_embeds": text["pooled"].to(dtype), "time_ids": self._time_ids(x, text)}
            temb = temb + net.get_aug_embed(emb=temb, encoder_hidden_states=embeds, added_cond_kwargs=added)
        if net.time_embed_act is not None:
            temb = net.time_embed_act(temb)
        sample = net.conv_in(latents)
        return UNetState(sample, (sample,), temb, embeds)

    def block(self, k: int, state: UNetState) -> UNetState:
        return run_layer(self.net, self._layers[k - 1], state)

    def exit(self, state: UNetState) -> Tensor:
        """What the network predicts (noise or ``v``), ``[B, C, h, w]``."""
        net, sample = self.net, state.sample
        if net.conv_norm_out is not None:
            sample = net.conv_act(net.conv_norm_out(sample))
        output: Tensor = net.conv_out(sample)
        return output

    def upstream(self, x: NoisyLatent, condition: Condition) -> Tensor:
        text, added = condition.tensors, None
        if "pooled" in text:
            added = {"text_embeds": text["pooled"], "time_ids": self._time_ids(x, text)}
        timestep, embeds = self.time.timestep(x.sigma), text["embeds"]
        output: Tensor = self.net(x.latents, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        return output

    def grid(self, state: UNetState) -> Tensor:
        """The layer's own map: channels and resolution differ from cut to cut (see ``feature_info``)."""
        return state.sample

    def example(self, batch: int = 1) -> tuple[NoisyLatent, Condition]:
        side, zeros = self.native_resolution // self.latent_factor, partial(torch.zeros, device=self.device)
        return NoisyLatent(zeros(batch, self.latent_channels, side, side), zeros(batch)), self._zeros(batch)

    def _zeros(self, batch: int) -> Condition:
        shapes = {"embeds": (batch, self._text_tokens), "pooled": (batch,)}
        return Condition(
            {name: torch.zeros(*shapes[name], width, device=self.device) for name, width in self.widths.items()}
        )

    def _time_ids(self, x: NoisyLatent, text: Mapping[str, Tensor]) -> Tensor:
        if "time_ids" in text:
            return text["time_ids"].float()
        size = [side * self.latent_factor for side in x.latents.shape[-2:]]
        ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=x.latents.device)
        return ids.expand(len(x.latents), _TIME_IDS)

    def _check(self, x: NoisyLatent, condition: Condition) -> None:
        """Raise :class:`SliceError` for what upstream would answer with a bare matmul error, or not at all."""
        given = {name: tensor.shape[-1] for name, tensor in condition.tensors.items()}
        optional = {"time_ids": _TIME_IDS} if "pooled" in self.widths else {}
        if given not in (self.widths, self.widths | optional):
            extra = f" (and {optional}, or none)" if optional else ""
            raise SliceError(
                f"this UNet reads prompt embeddings of widths {self.widths}{extra}, got {given}; use encode_prompts."
            )

    # -- latents, text, time ------------------------------------------------------------------------------------------

    def noisy(self, latents: Tensor, sigma: float | Tensor) -> NoisyLatent:
        """As :meth:`Backbone.noisy`, with levels above the largest trained one (0.9977 for SD) read as that one.

        The network knows no noisier latents, pipelines start from pure noise in the same way, and the signal's weight
        ``alpha``, which an epsilon prediction is divided by, is 0 at ``sigma = 1``.
        """
        x = super().noisy(latents, sigma)
        return attrs.evolve(x, sigma=x.sigma.clamp_max(self.time.highest))

    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        """``[steps + 1]``: the levels of the timesteps that the pipeline's scheduler visits, then 0; whatever the
        size."""
        return self.time.grid(steps)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompt embeddings, one sample a prompt: as the pipeline's ``encode_prompt`` gives them, without guidance.

        Raises :class:`ConfigError` for an empty list or a bare string.
        """
        if not isinstance(prompts, list) or not prompts:
            raise ConfigError(f"encode_prompts takes a list of at least one prompt, got {prompts!r}.")
        return Condition(self.companions.text(list(prompts), self.device))

    def null_condition(self) -> Condition:
        """What the pipeline's guidance starts from: the empty prompt's embedding; zeros for SDXL, which needs no text
        encoder."""
        return self._zeros(1) if self._zero_null else super().null_condition()

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to scaled latents (the posterior's mode), float32.

        Raises :class:`SliceError` unless the sides are multiples of a latent pixel's.
        """
        return self.companions.encode_images(images, self.device, self.latent_factor)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.companions.decode_latents(latents, self.device)

    # -- beside a pipeline --------------------------------------------------------------------------------------------

    def pipeline_sigmas(self, pipeline: Any) -> Tensor:
        return pipeline_levels(pipeline.scheduler, self.time)

    def from_pipeline_latents(
        self, pipeline: Any, latents: Tensor, sigma: float, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Schedulers of Euler's kind hold ``z / alpha``, the others ``z``."""
        return latents * self._signal(sigma) if unit_signal(pipeline.scheduler) else latents

    def to_pipeline_latents(self, pipeline: Any, latents: Tensor, sigma: float) -> Tensor:
        return latents / self._signal(sigma) if unit_signal(pipeline.scheduler) else latents

    def _signal(self, sigma: float) -> float:
        return float(self.path.alpha(torch.tensor(sigma, dtype=torch.float64)))

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """A frozen backbone with random weights from torch's generator, or without any on the meta device.

        ``architecture``: see :class:`UNetArchitecture`. Its text side is :class:`HashedText`. Raises
        :class:`ConfigError` for an unknown or missing setting.
        """
        try:
            settings = UNetArchitecture(**architecture)
            with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
                net = UNet2DConditionModel(**settings.unet).requires_grad_(False)
            vae = on_meta(partial(AutoencoderKL, **settings.vae))
            scheduler = DDIMScheduler(**settings.scheduler)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"not a UNet architecture: {error}.") from error
        widths = _widths(net.config)
        companions = Companions(
            vae_config=dict(vae.config),
            scheduler_config=dict(scheduler.config),
            text=HashedText(settings.text_tokens, widths["embeds"], widths.get("pooled")),
            open_vae=partial(random_vae, settings.vae, seed=int(torch.randint(2**31, ()))),
        )
        return cls(
            net.to(device),
            companions,
            DiscreteTime.of(scheduler),
            text_tokens=settings.text_tokens,
            zero_null=settings.force_zeros_for_empty_prompt,
        ).eval()

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

        With a ``cut`` only the head up to that layer is read from disk (the stem for ``LATENT``). VAE and text encoders
        are fetched and read when they are first used. Raises :class:`WeightsError` for a checkpoint that is missing,
        gated, incomplete, truncated or of another architecture than the record's, and :class:`ConfigError` for a UNet
        or scheduler of a kind that cannot be used here.
        """
        fetch, expected = fetcher(record, token, local_files_only), record.architecture
        root, precision = fetch("*.json"), dtype or getattr(torch, record.dtype)
        config = read_config(root / "unet", UNet2DConditionModel, expected.get("unet", {}))
        vae_config = read_config(root / "vae", AutoencoderKL, expected.get("vae", {}))
        # Early VAE configurations leave out what the class has a default for, the scaling factor among it.
        vae_config = dict(on_meta(partial(AutoencoderKL.from_config, vae_config)).config)
        scheduler_config = read_json(root / "scheduler" / "scheduler_config.json")
        net = on_meta(partial(UNet2DConditionModel.from_config, config))
        double = "pooled" in _widths(net.config)
        kind, text = (StableDiffusionXLPipeline, SdxlText) if double else (StableDiffusionPipeline, SdText)
        companions = Companions(
            vae_config=_scaled_only(vae_config),
            scheduler_config=scheduler_config,
            text=text(partial(open_clip_text, fetch, kind, precision)),
            open_vae=partial(open_vae, fetch, vae_config),
        )
        backbone = cls(
            net,
            companions,
            DiscreteTime.from_config(scheduler_config),
            native_resolution=record.resolution,
            text_tokens=int(expected.get("text_tokens", TEXT_TOKENS)),
            zero_null=bool(read_json(root / "model_index.json").get("force_zeros_for_empty_prompt", True)),
        ).eval()
        return cast(Self, fill(backbone, fetch, "unet", cut, dtype=precision, device=device))

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, record: BackboneRecord | None = None, **options: Any) -> Self:
        """The backbone of a loaded ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``, sharing its modules
        and leaving them as they are.

        ``record`` is what the registry says about it, compared with what is there; there are no ``options``. A VAE in
        float16 that overflows there (``force_upcast``) is copied to float32 when it is first used. Raises
        :class:`WeightsError` for another kind of pipeline, and for one without its VAE, offloaded, or of another
        architecture than the record's; :class:`ConfigError` for an option, and for a UNet or scheduler of a kind that
        cannot be used here.
        """
        if options:
            raise ConfigError(f"unknown setting {', '.join(sorted(options))}; a pipeline with a UNet takes none.")
        expected = record.architecture if record is not None else {}
        net = loaded_part(pipeline, "unet", UNet2DConditionModel, expected.get("unet", {}))
        vae = loaded_part(pipeline, "vae", AutoencoderKL, expected.get("vae", {}))
        text = SdxlText if "pooled" in _widths(net.config) else SdText
        companions = Companions(
            vae_config=_scaled_only(vae.config),
            scheduler_config=dict(pipeline.scheduler.config),
            text=text(lambda: pipeline),
            open_vae=lambda: _upcast(vae),
        )
        return cls(
            net,
            companions,
            DiscreteTime.of(pipeline.scheduler),
            native_resolution=record.resolution if record else None,
            text_tokens=_text_tokens(pipeline),
            zero_null=bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
        )


def _widths(config: Any) -> dict[str, int]:
    """What :attr:`UNetBackbone.widths` says, from the network's configuration."""
    widths = {"embeds": config.cross_attention_dim}
    if config.addition_embed_type == "text_time":
        sizes = _TIME_IDS * config.addition_time_embed_dim
        widths["pooled"] = config.projection_class_embeddings_input_dim - sizes
    return widths


def _scaled_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """A VAE's configuration; :class:`ConfigError` when its latents are normalised by more than one factor."""
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ConfigError("the VAE normalises each channel of its latents (latents_mean, latents_std); not supported.")
    return dict(config)


def _upcast(vae: AutoencoderKL) -> AutoencoderKL:
    """The VAE itself, or a float32 copy of one that must not run in float16."""
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        return copy.deepcopy(vae).float()
    return vae


def _text_tokens(pipeline: Any) -> int:
    tokenizer = getattr(pipeline, "tokenizer", None) or getattr(pipeline, "tokenizer_2", None)
    return TEXT_TOKENS if tokenizer is None else int(tokenizer.model_max_length)
