"""PixArt-Sigma and PixArt-Alpha: diffusers' ``PixArtTransformer2DModel``, cut after any of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from stitchvm.core import (
    Backbone,
    BackboneRecord,
    Condition,
    ConfigError,
    NoisyLatent,
    SliceError,
    VariancePreservingPath,
    WeightsError,
    count,
    resolve_source,
)

from .schedule import Schedule
from .text import HashedText, T5Text, TextSide
from .weights import files_of, load, read_config

WEIGHTS = "diffusion_pytorch_model"


@attrs.frozen
class PixArtArchitecture:
    """What :meth:`PixArtBackbone.build` takes: the settings of ``PixArtTransformer2DModel``, ``AutoencoderKL`` and
    ``DPMSolverMultistepScheduler``, and how many tokens T5 reads (300 for Sigma, 120 for Alpha).
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any] = attrs.field(factory=dict)
    max_sequence_length: int = 300


@attrs.define(eq=False)
class Companions:
    """What belongs to the denoiser and is not cut: the VAE, opened on first use and kept in float32, and the text."""

    text: TextSide
    open_vae: Callable[[], AutoencoderKL]
    scaling: float
    factor: int
    _vae: AutoencoderKL | None = attrs.field(default=None, init=False)

    def vae(self, device: torch.device) -> AutoencoderKL:
        self._vae = self._vae or self.open_vae()
        return self._vae.to(device)


@attrs.define(eq=False)
class PixArtState:
    """Between two blocks: image ``tokens [B, rows * columns, C]``, the projected ``text [B, T, C]`` with its attention
    ``bias [B, 1, T]``, the blocks' ``modulation [B, 6 C]`` and the embedded ``time [B, C]``."""

    tokens: Tensor
    text: Tensor
    bias: Tensor
    modulation: Tensor
    time: Tensor
    rows: int
    columns: int


class PixArtBackbone(Backbone):
    """A ``Backbone`` over ``PixArtTransformer2DModel``; its condition is ``{"embeds": [B, T, D], "mask": [B, T]}``.

    A network that reads micro-conditions (PixArt-Alpha at 1024 pixels) is told that the image has the size the latents
    say. One that also predicts a variance is read for the noise alone, as its pipeline does.
    """

    net: PixArtTransformer2DModel
    companions: Companions
    path = VariancePreservingPath()
    prediction = "epsilon"

    def __init__(
        self, net: PixArtTransformer2DModel, companions: Companions, schedule: Schedule, *, text_tokens: int,
        native_resolution: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(net)
        if net.caption_projection is None:
            raise ConfigError("this PixArt projects no captions (caption_channels); it cannot be used here.")
        self.companions, self.schedule, self.text_tokens = companions, schedule, text_tokens
        self.latent_channels, self.latent_factor = net.config.in_channels, companions.factor
        self.native_resolution = native_resolution or net.config.sample_size * self.latent_factor

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("pos_embed", "adaln_single", "caption_projection")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{k}" for k in range(self.net.config.num_layers))

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("norm_out", "scale_shift_table", "proj_out")

    def stem(self, x: NoisyLatent, condition: Condition) -> PixArtState:
        """Patches with positions, the projected prompt, and what time (and size) modulate the blocks with."""
        net, dtype, batch = self.net, self.dtype, len(x.latents)
        self._check(x, condition)
        text = condition.tensors_for(batch, x.latents.device)
        tokens = net.pos_embed(x.latents.to(dtype))
        modulation, time = net.adaln_single(
            self.schedule.timestep(x.sigma), self._sizes(x), batch_size=batch, hidden_dtype=tokens.dtype
        )
        projected = net.caption_projection(text["embeds"].to(dtype)).view(batch, -1, tokens.shape[-1])
        bias = ((1 - text["mask"].to(dtype)) * -10000.0).unsqueeze(1)
        rows, columns = (side // net.config.patch_size for side in x.latents.shape[-2:])
        return PixArtState(tokens, projected, bias, modulation, time, rows, columns)

    def block(self, k: int, state: PixArtState) -> PixArtState:
        tokens = self.net.transformer_blocks[k - 1](
            state.tokens,
            encoder_hidden_states=state.text,
            encoder_attention_mask=state.bias,
            timestep=state.modulation,
        )
        return attrs.evolve(state, tokens=tokens)

    def exit(self, state: PixArtState) -> Tensor:
        """The predicted noise ``[B, C, h, w]``: norm, modulation, projection, and the patches put back in place."""
        net, side = self.net, self.net.config.patch_size
        shift, scale = (net.scale_shift_table[None] + state.time[:, None]).chunk(2, dim=1)
        tokens = net.proj_out(net.norm_out(state.tokens) * (1 + scale) + shift)
        patches = tokens.reshape(-1, state.rows, state.columns, side, side, net.out_channels)
        whole = torch.einsum("nhwpqc->nchpwq", patches).flatten(4, 5).flatten(2, 3)
        return whole[:, : self.latent_channels]

    def grid(self, state: PixArtState) -> Tensor:
        return state.tokens.transpose(1, 2).reshape(len(state.tokens), -1, state.rows, state.columns)

    def upstream(self, x: NoisyLatent, condition: Condition) -> Tensor:
        output: Tensor = self.net(
            x.latents,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            timestep=self.schedule.timestep(x.sigma),
            added_cond_kwargs=self._sizes(x),
        ).sample
        return output.chunk(2, dim=1)[0] if self.net.out_channels == 2 * self.latent_channels else output

    def example(self, batch: int = 1) -> tuple[NoisyLatent, Condition]:
        side, zeros = self.native_resolution // self.latent_factor, partial(torch.zeros, device=self.device)
        text = {"embeds": zeros(batch, self.text_tokens, self._width), "mask": zeros(batch, self.text_tokens)}
        return NoisyLatent(zeros(batch, self.latent_channels, side, side), zeros(batch)), Condition(text)

    @property
    def _width(self) -> int:
        return int(self.net.config.caption_channels)

    def _sizes(self, x: NoisyLatent) -> dict[str, Tensor | None]:
        """Height and width in pixels and their ratio, for a network that reads them."""
        if not self.net.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        batch, (height, width) = len(x.latents), (side * self.latent_factor for side in x.latents.shape[-2:])
        size = torch.tensor([height, width], dtype=torch.float32, device=x.latents.device)
        ratio = torch.tensor([height / width], dtype=torch.float32, device=x.latents.device)
        return {"resolution": size.repeat(batch, 1), "aspect_ratio": ratio.repeat(batch, 1)}

    def _check(self, x: NoisyLatent, condition: Condition) -> None:
        """Raise :class:`SliceError` for what upstream would answer with a bare reshape or matmul error."""
        patch, sides = self.net.config.patch_size, list(x.latents.shape[-2:])
        if any(side % patch for side in sides):
            raise SliceError(
                f"latent sides must be multiples of {patch}, got {sides}; that is multiples of "
                f"{patch * self.latent_factor} image pixels."
            )
        given = {name: tuple(tensor.shape[1:]) for name, tensor in condition.tensors.items()}
        tokens = given.get("mask", (0,))[0]
        if given != {"embeds": (tokens, self._width), "mask": (tokens,)}:
            raise SliceError(
                f"PixArt reads prompt embeddings [B, T, {self._width}] and their mask [B, T], got {given}; "
                "use encode_prompts."
            )

    # -- latents, text, time ------------------------------------------------------------------------------------------

    def noisy(self, latents: Tensor, sigma: float | Tensor) -> NoisyLatent:
        """As ``Backbone.noisy``, with levels above the largest trained one read as that one."""
        x = super().noisy(latents, sigma)
        return attrs.evolve(x, sigma=x.sigma.clamp_max(self.schedule.highest))

    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        return self.schedule.sigmas(steps)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Raises :class:`ConfigError` for an empty list or a bare string."""
        if not isinstance(prompts, list) or not prompts:
            raise ConfigError(f"encode_prompts takes a list of at least one prompt, got {prompts!r}.")
        return Condition(self.companions.text(list(prompts), self.device))

    def encode_images(self, images: Tensor) -> Tensor:
        """Raises :class:`SliceError` unless the sides are multiples of a token's pixels."""
        multiple = self.latent_factor * self.net.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or any(side % multiple for side in images.shape[-2:]):
            raise SliceError(
                f"images must be [batch, 3, height, width] with sides that are multiples of {multiple}, got "
                f"{list(images.shape)}; resize or crop them first."
            )
        count("encoder", len(images))
        posterior = self.companions.vae(self.device).encode(images.to(self.device).float() * 2 - 1).latent_dist
        latents: Tensor = posterior.mode() * self.companions.scaling
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        count("decoder", len(latents))
        vae = self.companions.vae(self.device)
        pixels: Tensor = vae.decode(latents.to(self.device).float() / self.companions.scaling, return_dict=False)[0]
        return pixels / 2 + 0.5

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """With random weights, and text that is :class:`HashedText`; :class:`ConfigError` for an unknown setting."""
        try:
            settings = PixArtArchitecture(**architecture)
            with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
                net = PixArtTransformer2DModel(**settings.transformer).requires_grad_(False)
            seed = int(torch.randint(2**31, ()))
            vae = partial(_random_vae, settings.vae, seed)
            text = HashedText(settings.max_sequence_length, net.config.caption_channels)
            companions = Companions(text, vae, *_vae_scale(settings.vae))
            schedule = Schedule.of(settings.scheduler)
        except TypeError as error:
            raise ConfigError(f"not an architecture for PixArt: {error}.") from error
        return cls(net.to(device), companions, schedule, text_tokens=settings.max_sequence_length).eval()

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
        """From a diffusers folder or hub repository; with a ``cut``, only what a head there needs is read.

        Raises :class:`WeightsError` for weights that are missing, damaged or of another architecture.
        """

        def fetch(*patterns: str) -> Path:
            return resolve_source(record, patterns=patterns, token=token, local_files_only=local_files_only)

        root, expected = fetch("*.json"), record.architecture
        config = read_config(root / "transformer" / "config.json", expected.get("transformer", {}))
        if config.get("_class_name") != "PixArtTransformer2DModel":
            raise WeightsError(f"{root} holds a {config.get('_class_name')}, expected a PixArtTransformer2DModel.")
        vae_config = read_config(root / "vae" / "config.json", expected.get("vae", {}))
        schedule = Schedule.of(read_config(root / "scheduler" / "scheduler_config.json", {}))
        precision = dtype or getattr(torch, record.dtype)
        with torch.device("meta"):
            net = PixArtTransformer2DModel.from_config(config).requires_grad_(False)
        tokens = int(expected.get("max_sequence_length", 300))
        text = T5Text(partial(_open_text, fetch, precision), tokens)
        companions = Companions(text, partial(_open_vae, fetch, vae_config), *_vae_scale(vae_config))
        backbone = cls(net, companions, schedule, text_tokens=tokens, native_resolution=record.resolution).eval()
        prefixes = None
        if cut is not None:
            backbone.check_cut(cut)
            prefixes = backbone.tensor_prefixes(0, max(cut, 0))
            backbone = backbone.prune(0, max(cut, 0))
            backbone.companions = companions
        files = files_of(root / "transformer", WEIGHTS, prefixes)
        fetch(*(f"transformer/{file.name}" for file in files))
        load(backbone.net, files, prefixes=prefixes, dtype=precision, device=device)
        backbone.net.pos_embed.pos_embed = _positions(net.config).to(device)
        return backbone


def _positions(config: Any) -> Tensor:
    """The table of positions, which is computed and not in a checkpoint."""
    width = config.num_attention_heads * config.attention_head_dim
    scale = config.interpolation_scale or max(config.sample_size // 64, 1)
    size = config.sample_size
    embed = PatchEmbed(size, size, config.patch_size, config.in_channels, width, interpolation_scale=scale)
    table: Tensor = embed.pos_embed
    return table


def _vae_scale(config: Mapping[str, Any]) -> tuple[float, int]:
    """What latents are multiplied with, and image pixels per latent pixel."""
    return float(config["scaling_factor"]), int(2 ** (len(config["block_out_channels"]) - 1))


def _random_vae(config: Mapping[str, Any], seed: int) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**config).requires_grad_(False).eval()


def _open_vae(fetch: Callable[..., Path], config: Mapping[str, Any]) -> AutoencoderKL:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config)).eval()
    folder = fetch("vae/*.json") / "vae"
    files = files_of(folder, WEIGHTS, None)
    fetch(*(f"vae/{file.name}" for file in files))
    load(vae, files, dtype=torch.float32, device="cpu")
    return vae


def _open_text(fetch: Callable[..., Path], dtype: torch.dtype) -> Any:
    """A ``PixArtSigmaPipeline`` with nothing but its text encoder and tokenizer."""
    from diffusers import PixArtSigmaPipeline

    folder = fetch("*.json", "tokenizer/*", "text_encoder/*.safetensors")
    try:
        return PixArtSigmaPipeline.from_pretrained(
            folder, transformer=None, vae=None, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"the text encoder in {folder} cannot be read: {error}") from error
