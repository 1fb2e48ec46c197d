"""What a diffusers pipeline has beside its denoiser, opened on first use: VAE, scheduler settings, text side."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import attrs
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stitchvm.core import ConfigError, SliceError, count

DECODED_TOGETHER = 16
"""Latents that the VAE decodes in one pass."""


class TextSide(Protocol):
    """Prompts to ``{"embeds": [B, T, D], "pooled": [B, P]}`` on a device; a family may have no ``pooled``."""

    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]: ...


@attrs.define(eq=False)
class Companions:
    """The VAE, the scheduler's settings and the text side.

    A VAE opened from files stays in float32: it is small, and half precision shows in latents and rewards.
    ``uniform_levels``: before the scheduler's shift, noise levels fall evenly from 1 to ``1 / steps``, as FLUX's
    pipeline asks for; otherwise from the scheduler's largest to its smallest, as SD 3's does.
    """

    vae_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    text: TextSide
    open_vae: Callable[[], AutoencoderKL]
    uniform_levels: bool = False
    _vae: AutoencoderKL | None = attrs.field(default=None, init=False)

    def vae(self, device: torch.device) -> AutoencoderKL:
        """The frozen VAE, moved to ``device``."""
        if self._vae is None:
            self._vae = self.open_vae()
        return self._vae.to(device)

    @property
    def latent_factor(self) -> int:
        """Image pixels per latent pixel: every VAE block but the last halves the side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def scale_and_shift(self) -> tuple[float, float]:
        """``(scale, shift)`` of ``latents = (encoded - shift) * scale``; no shift is 0."""
        return float(self.vae_config["scaling_factor"]), float(self.vae_config.get("shift_factor") or 0.0)

    def encode_images(self, images: Tensor, device: torch.device, multiple: int) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to scaled latents (the posterior's mode), float32, counted as ``encoder``.

        Raises :class:`SliceError` unless the sides are multiples of ``multiple`` pixels.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % multiple or images.shape[3] % multiple:
            raise SliceError(
                f"images must be [batch, 3, height, width] with sides that are multiples of {multiple}, "
                f"got {list(images.shape)}; resize or crop them first."
            )
        count("encoder", len(images))
        vae, (scale, shift) = self.vae(device), self.scale_and_shift
        posterior = vae.encode(images.to(device, vae.dtype) * 2 - 1).latent_dist
        latents: Tensor = (posterior.mode().float() - shift) * scale
        return latents

    def decode_latents(self, latents: Tensor, device: torch.device) -> Tensor:
        """Scaled latents to images ``[B, 3, H, W]``, nominally in [0, 1], float32, counted as ``decoder``."""
        count("decoder", len(latents))
        vae, (scale, shift) = self.vae(device), self.scale_and_shift
        # a few at a time: full-size activations of a large batch cost more to allocate than to compute
        parts = (latents.to(device, vae.dtype) / scale + shift).split(DECODED_TOGETHER)
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
        return pixels.float() / 2 + 0.5

    def sigmas(self, steps: int, image_tokens: int) -> Tensor:
        """``[steps + 1]`` falling noise levels ending in 0, float32, as the pipeline's scheduler would use them.

        ``image_tokens`` sets the shift of a scheduler with dynamic shifting. Raises :class:`ConfigError` for fewer than
        one step or a scheduler whose levels do not fall from at most 1 to 0.
        """
        if steps < 1:
            raise ConfigError(f"sampling needs at least 1 step, got {steps}.")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler_config))
        levels = np.linspace(1.0, 1.0 / steps, steps) if self.uniform_levels else None
        scheduler.set_timesteps(steps, sigmas=levels, mu=self._mu(scheduler.config, image_tokens))
        sigmas: Tensor = scheduler.sigmas.float()
        if sigmas[0] > 1 or sigmas[-1] != 0 or bool((sigmas.diff() >= 0).any()):
            raise ConfigError(
                f"the scheduler's noise levels run from {sigmas[0]:g} to {sigmas[-1]:g}; "
                "expected a fall from at most 1 to 0 (invert_sigmas is not supported)."
            )
        return sigmas

    @staticmethod
    def _mu(config: Mapping[str, Any], image_tokens: int) -> float | None:
        """The shift of dynamic shifting, linear in the sequence length through the scheduler's two anchor points."""
        if not config["use_dynamic_shifting"]:
            return None
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (high - low)
        return float(config["base_shift"] + slope * (image_tokens - low))


@attrs.frozen
class HashedText:
    """Text conditioning for a network with random weights, which no trained text encoder fits.

    Every word becomes a standard normal vector seeded by its hash, so that equal prompts agree, different prompts
    differ and nothing is downloaded. It means nothing; it is what twins are run with. ``pooled_width`` is None for a
    network that reads no pooled text.
    """

    tokens: int
    width: int
    pooled_width: int | None

    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds = torch.zeros(len(prompts), self.tokens, self.width)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(prompt.split()[: self.tokens]):
                embeds[row, column] = _seeded(word, self.width)
        if self.pooled_width is None:
            return {"embeds": embeds.to(device)}
        pooled = torch.stack([_seeded(prompt, self.pooled_width) for prompt in prompts])
        return {"embeds": embeds.to(device), "pooled": pooled.to(device)}


def _seeded(text: str, width: int) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@attrs.define(eq=False)
class PipelineText(ABC):
    """The text side of a diffusers pipeline, through its own ``encode_prompt``; the pipeline is opened on first use.

    A kind of pipeline names the encoders it cannot do without (``required``) and those it may lack (``optional``), and
    calls ``encode_prompt``. ``max_sequence_length`` counts T5's tokens, where there is one. Raises
    :class:`ConfigError` for a pipeline that was loaded without a required encoder.
    """

    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()

    open_pipeline: Callable[[], Any]
    max_sequence_length: int | None = None
    _pipeline: Any = attrs.field(default=None, init=False)

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """What the pipeline makes of ``prompts`` without classifier-free guidance."""

    @torch.no_grad()
    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        if self._pipeline is None:
            self._pipeline = self.open_pipeline()
        for name in (*self.required, *self.optional):
            encoder = getattr(self._pipeline, name, None)
            if encoder is not None:
                encoder.to(device)
            elif name in self.required:
                raise ConfigError(f"the pipeline was loaded without its {name}, which reads prompts; load it with one.")
        return self.encode(self._pipeline, prompts, device)


class Sd3Text(PipelineText):
    """``StableDiffusion3Pipeline``: both CLIPs' tokens, then T5's (zeros without one); both CLIPs' pooled text."""

    required = ("text_encoder", "text_encoder_2")
    optional = ("text_encoder_3",)

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        length = {"max_sequence_length": self.max_sequence_length}
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=device, do_classifier_free_guidance=False, **length
        )
        return {"embeds": embeds, "pooled": pooled}


class FluxText(PipelineText):
    """``FluxPipeline``: T5's tokens and CLIP's pooled text."""

    required = ("text_encoder", "text_encoder_2")

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        length = {"max_sequence_length": self.max_sequence_length}
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=device, **length)
        return {"embeds": embeds, "pooled": pooled}


_ONCE: dict[str, Any] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


class SdText(PipelineText):
    """``StableDiffusionPipeline``: CLIP's tokens, no pooled text."""

    required = ("text_encoder",)

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        return {"embeds": pipeline.encode_prompt(list(prompts), device=device, **_ONCE)[0]}


class SdxlText(PipelineText):
    """``StableDiffusionXLPipeline``: both CLIPs' last layer but one, side by side, and the second one's pooled text."""

    required = ("text_encoder_2",)
    optional = ("text_encoder",)

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, **_ONCE)
        return {"embeds": embeds, "pooled": pooled}
