"""What SD 3 and FLUX share: a transformer over image and text tokens, flow matching, and the pipeline around it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self, cast

import attrs
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stitchvm.core import (
    Backbone,
    BackboneRecord,
    Condition,
    ConfigError,
    FlowPath,
    NoisyLatent,
    SliceError,
)

from .companions import Companions, HashedText, TextSide
from .folders import Fetch, fetcher, fill, loaded_part, on_meta, open_vae, random_vae, read_config


@attrs.define(eq=False)  # not frozen: torch.compile cannot follow how attrs writes a frozen instance
class TokenState:
    """Between two blocks: ``image [B, rows * columns, C]`` and ``context [B, T, C]`` tokens, ``temb [B, C]``.

    ``temb`` embeds time and pooled text. The context is None where a last block drops it.
    """

    image: Tensor
    context: Tensor | None
    temb: Tensor
    rows: int
    columns: int


class FlowTransformer(Backbone):
    """A :class:`Backbone` over a diffusers transformer; its condition is ``{"embeds": [B, T, D], "pooled": [B, P]}``.

    A family names the upstream ``network`` (a class) and ``pipeline``, the attrs class ``architecture`` that ``build``
    takes (with ``transformer``, ``vae``, ``scheduler`` and ``max_sequence_length``), ``options`` (those of its other
    settings that the constructor takes), ``leading_tokens`` (what other encoders put in front of T5's tokens) and
    ``uniform_levels`` (see :class:`Companions`); it gives the text side and writes the slicing.

    ``companions`` hold the VAE, the scheduler's settings and the text side; ``patch`` latent pixels along a side make
    one image token; ``native_resolution`` is in image pixels; ``text_tokens`` is the length of ``embeds``.
    """

    network: ClassVar[Any]
    pipeline: ClassVar[str]
    architecture: ClassVar[Any]
    options: ClassVar[tuple[str, ...]] = ()
    leading_tokens: ClassVar[int] = 0
    uniform_levels: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = (
        *Backbone.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip

    companions: Companions
    path = FlowPath()
    prediction = "velocity"
    patch: int
    text_tokens: int

    # -- what a family writes -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def text_of_folder(cls, fetch: Fetch, config: Mapping[str, Any], length: int, dtype: torch.dtype) -> TextSide:
        """The text side of a pipeline folder whose transformer has ``config``, opened on first use."""

    @classmethod
    @abstractmethod
    def text_of_pipeline(cls, pipeline: Any, length: int) -> TextSide:
        """The text side of a loaded pipeline."""

    def __init__(self, net: Any, companions: Companions, *, max_sequence_length: int, **_: Any) -> None:
        """A family's own also sets ``latent_channels``, ``patch`` and ``native_resolution``, and takes the ``options``
        and ``native_resolution``. ``max_sequence_length`` counts T5's tokens.
        """
        super().__init__(net)
        self.companions = companions
        self.latent_factor, self.latent_scale = companions.latent_factor, companions.scale_and_shift
        self.text_tokens = self.leading_tokens + max_sequence_length

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("norm_out", "proj_out")

    def grid(self, state: TokenState) -> Tensor:
        return state.image.transpose(1, 2).reshape(len(state.image), -1, state.rows, state.columns)

    @property
    def widths(self) -> dict[str, int]:
        """The last dimension of every tensor of prompt embeddings the network reads."""
        config: Any = self.net.config
        return {"embeds": config.joint_attention_dim, "pooled": config.pooled_projection_dim}

    def example(self, batch: int = 1) -> tuple[NoisyLatent, Condition]:
        side, zeros = self.native_resolution // self.latent_factor, partial(torch.zeros, device=self.device)
        shapes = {"embeds": (batch, self.text_tokens), "pooled": (batch,)}
        text = {name: zeros(*shapes[name], width) for name, width in self.widths.items()}
        return NoisyLatent(zeros(batch, self.latent_channels, side, side), zeros(batch)), Condition(text)

    def check_input(self, x: NoisyLatent, condition: Condition, largest: int | None = None) -> None:
        """Raise :class:`SliceError` for what upstream would answer with a bare reshape or matmul error.

        ``largest`` is the longest latent side that the network has positions for.
        """
        factor, sides = self.latent_factor, x.latents.shape[-2:]
        if any(side % self.patch or (largest is not None and side > largest) for side in sides):
            most, pixels = ("", "") if largest is None else (f" and at most {largest}", f" up to {largest * factor}")
            raise SliceError(
                f"latent sides must be multiples of {self.patch}{most}, got {list(sides)}; "
                f"that is multiples of {self.patch * factor} image pixels{pixels}."
            )
        given = {name: tensor.shape[-1] for name, tensor in condition.tensors.items()}
        if given != self.widths:
            raise SliceError(
                f"{type(self).__name__} reads prompt embeddings of widths {self.widths}, got {given}; "
                "use encode_prompts."
            )

    # -- latents, text, time ------------------------------------------------------------------------------------------

    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        return self.companions.sigmas(steps, (latent_shape[0] // self.patch) * (latent_shape[1] // self.patch))

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompt embeddings, one sample a prompt: as the pipeline's ``encode_prompt`` gives them, without guidance.

        Raises :class:`ConfigError` for an empty list or a bare string.
        """
        if not isinstance(prompts, list) or not prompts:
            raise ConfigError(f"encode_prompts takes a list of at least one prompt, got {prompts!r}.")
        return Condition(self.companions.text(list(prompts), self.device))

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to scaled latents (the posterior's mode), float32.

        Raises :class:`SliceError` unless the sides are multiples of a token's pixels.
        """
        return self.companions.encode_images(images, self.device, self.latent_factor * self.patch)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.companions.decode_latents(latents, self.device)

    def pipeline_sigmas(self, pipeline: Any) -> Tensor:
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ConfigError(
                f"the pipeline's scheduler is a {type(scheduler).__name__}; the levels of flow matching are read from "
                "a FlowMatchEulerDiscreteScheduler."
            )
        sigmas: Tensor = scheduler.sigmas.float().cpu()
        return sigmas

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """A frozen backbone with random weights from torch's generator, or without any on the meta device.

        ``architecture``: what the class of that name takes. Its text side is :class:`HashedText`. Raises
        :class:`ConfigError` for an unknown or missing setting.
        """
        try:
            settings = cls.architecture(**architecture)
            with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
                net = cls.network(**settings.transformer).requires_grad_(False)
            vae = on_meta(partial(AutoencoderKL, **settings.vae))
            scheduler = FlowMatchEulerDiscreteScheduler(**settings.scheduler)
        except TypeError as error:
            raise ConfigError(f"not an architecture for {cls.__name__}: {error}.") from error
        tokens, config = cls.leading_tokens + settings.max_sequence_length, net.config
        companions = Companions(
            vae_config=dict(vae.config),
            scheduler_config=dict(scheduler.config),
            text=HashedText(tokens, config.joint_attention_dim, config.pooled_projection_dim),
            open_vae=partial(random_vae, settings.vae, seed=int(torch.randint(2**31, ()))),
            uniform_levels=cls.uniform_levels,
        )
        options = {name: getattr(settings, name) for name in ("max_sequence_length", *cls.options)}
        return cls(net.to(device), companions, **options).eval()

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
        config = read_config(root / "transformer", cls.network, expected.get("transformer", {}))
        vae_config = read_config(root / "vae", AutoencoderKL, expected.get("vae", {}))
        options = {name: expected[name] for name in cls.options if name in expected}
        length = int(expected.get("max_sequence_length", attrs.fields(cls.architecture).max_sequence_length.default))
        companions = Companions(
            vae_config=vae_config,
            scheduler_config=read_config(root / "scheduler", FlowMatchEulerDiscreteScheduler, {}),
            text=cls.text_of_folder(fetch, config, length, precision),
            open_vae=partial(open_vae, fetch, vae_config),
            uniform_levels=cls.uniform_levels,
        )
        backbone = cls(
            on_meta(partial(cls.network.from_config, config)),
            companions,
            native_resolution=record.resolution,
            max_sequence_length=length,
            **options,
        ).eval()
        return cast(Self, fill(backbone, fetch, "transformer", cut, dtype=precision, device=device))

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, record: BackboneRecord | None = None, **options: Any) -> Self:
        """The backbone of a loaded pipeline, sharing its modules and leaving them as they are.

        ``record`` is what the registry says about it, compared with what is there; ``options`` come before it:
        ``max_sequence_length``, the T5 token count that the pipeline is called with (the family's default when neither
        says), and the family's own. Raises :class:`WeightsError` for another kind of pipeline, and for one without its
        VAE, offloaded, or of another architecture than the record's; :class:`ConfigError` for an unknown option, and
        for a scheduler that is not of flow matching, whose noise levels would be others.
        """
        known = ("max_sequence_length", *cls.options)
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"unknown setting {', '.join(unknown)} for a {cls.pipeline}; choose {', '.join(known)}.")
        scheduler = type(pipeline.scheduler).__name__
        if not (isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.startswith("FlowMatch")):
            raise ConfigError(
                f"the pipeline's scheduler is a {scheduler}, whose noise levels are not read here; give it a "
                "FlowMatchEulerDiscreteScheduler with the same shift."
            )
        expected = record.architecture if record is not None else {}
        net = loaded_part(pipeline, "transformer", cls.network, expected.get("transformer", {}))
        vae = loaded_part(pipeline, "vae", AutoencoderKL, expected.get("vae", {}))
        length = attrs.fields(cls.architecture).max_sequence_length.default
        settings = {"max_sequence_length": length} | {name: expected[name] for name in known if name in expected}
        settings |= options
        companions = Companions(
            vae_config=dict(vae.config),
            scheduler_config=dict(pipeline.scheduler.config),
            text=cls.text_of_pipeline(pipeline, settings["max_sequence_length"]),
            open_vae=lambda: vae,
            uniform_levels=cls.uniform_levels,
        )
        return cls(net, companions, native_resolution=record.resolution if record else None, **settings)
