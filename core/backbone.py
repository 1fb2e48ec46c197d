"""A diffusion backbone: a sliced denoiser, the path it lives on, its latents and its text conditioning."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from .conditions import Condition, concatenate
from .costs import count
from .errors import ConfigError, SliceError
from .paths import Path, Prediction, PredictionKind, as_sigma
from .records import BackboneRecord, name_of
from .reuse import BegunPass
from .slicing import Sliced
from .validators import checked_number
from .weights_file import read_weights


@attrs.frozen(eq=False)
class NoisyLatent:
    """A backbone's input: ``latents [B, C, h, w]`` at noise level ``sigma [B]`` in [0, 1]."""

    latents: Tensor
    sigma: Tensor


class Backbone(Sliced):
    """A :class:`Sliced` denoiser whose ``x`` is a :class:`NoisyLatent` and whose condition is its prompt embeddings.

    A family sets ``path``, ``prediction`` (what the network's output means), ``latent_channels``, ``latent_factor``
    (image pixels per latent pixel), ``native_resolution`` (image pixels) and, where latents are ``(encoded - shift) *
    scale``, ``latent_scale = (scale, shift)``, and writes what is abstract here and in ``Sliced``. The VAE and the text
    encoders are loaded on first use, so that a head alone never reads them. A stem takes a condition of one sample or
    of as many as there are latents (``condition.tensors_for(batch)``).
    ``guided_passes`` of the network make one guided step: two, with the prompt and without, unless it was distilled to
    need one; ``guidance`` is the scale that such a network reads beside its time, if it reads one: the *embedded*
    guidance, which is no scale of classifier-free guidance (:func:`~stitchvm.core.sampling.chosen_guidance`).

    A family that takes loaded ``pipelines`` also says how their latents relate to its own: ``pipeline_sigmas`` and,
    where they look different, ``from_pipeline_latents`` and ``to_pipeline_latents``, which are linear in the latents.
    """

    guided_passes: ClassVar[int] = 2
    guidance: float | None = None
    latent_scale: tuple[float, float] | None = None
    _loaded_at: float | None = None
    _pruned_on = torch.device("cpu")
    component: ClassVar[str] = "transformer"
    """What diffusers' pipelines call the network, and its LoRA files begin their names with."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """The modules of ``net`` that a LoRA adapts, by the ends of their names."""

    path: Path
    prediction: PredictionKind
    latent_channels: int
    latent_factor: int
    native_resolution: int

    @abstractmethod
    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        """``[steps + 1]`` falling noise levels, ending in 0, from the model's own scheduler configuration."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Prompt embeddings, one sample a prompt."""

    def null_condition(self) -> Condition:
        """The embedding of the empty prompt, a batch of one: what a value model's head is conditioned on."""
        return self.encode_prompts([""])

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to scaled latents ``[B, C, h, w]`` (the posterior's mode), float32."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to images ``[B, 3, H, W]``, differentiable, nominally in [0, 1] and not clamped."""

    @property
    def device(self) -> torch.device:
        """Of its tensors; a part that has none, cut at the latents, is where it was cut."""
        first = next(self.net.parameters(), None)
        return self._pruned_on if first is None else first.device

    def input_grid(self, x: NoisyLatent) -> Tensor:
        return x.latents

    def noisy(self, latents: Tensor, sigma: float | Tensor) -> NoisyLatent:
        """Latents with their noise level, checked.

        Raises :class:`SliceError` for a wrong number of channels and ``NoiseLevelError`` for a sigma outside [0, 1].
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise SliceError(
                f"{type(self).__name__} reads latents [batch, {self.latent_channels}, height, width], "
                f"got {list(latents.shape)}. Encode images with encode_images first."
            )
        return NoisyLatent(latents, as_sigma(sigma, latents))

    def denoise(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition, begun: BegunPass | None = None
    ) -> Prediction:
        """One full pass, counted as ``denoiser``, read as a :class:`Prediction`; counted as ``resumed`` where it only
        finishes a pass that ``begun`` at the same input."""
        x, condition = self.noisy(latents, sigma), condition.expand(len(latents))
        if begun is not None and begun.answers(self, x, condition):
            count("resumed", len(latents))
            output = self.resume(begun.state, begun.cut)
        else:
            count("denoiser", len(latents))
            output = self.resume(self.head(x, condition, 0), 0)
        return self.path.interpret(self.prediction, output.to(latents.dtype), x.latents, x.sigma)

    def denoise_under(
        self, conditions: Sequence[Condition], latents: Tensor, sigma: float | Tensor, begun: BegunPass | None = None
    ) -> list[Prediction]:
        """A full pass under each of the ``conditions``, all in one batch, which is faster than one after the other; one
        that has ``begun`` is joined by the others at the block that it stopped after."""
        many, batch = len(conditions), len(latents)
        x, level = self.noisy(latents, sigma), as_sigma(sigma, latents)
        conditions = [condition.expand(batch) for condition in conditions]
        known = [begun is not None and begun.answers(self, x, condition) for condition in conditions]
        if begun is None or not any(known):
            every = self.denoise(latents.repeat(many, 1, 1, 1), level.repeat(many), concatenate(conditions))
            return [every.index(slice(start, start + batch)) for start in range(0, many * batch, batch)]
        count("resumed", batch * sum(known))
        count("denoiser", batch * (many - sum(known)))
        states = [begun.state if known[n] else self.head(x, condition, begun.cut)
                  for n, condition in enumerate(conditions)]  # fmt: skip
        state = self.map_state(lambda *tensors: torch.cat(tensors), *states)
        outputs = self.resume(state, begun.cut).to(latents.dtype).split(batch)
        return [self.path.interpret(self.prediction, output, x.latents, x.sigma) for output in outputs]

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
        """The record's architecture with the weights of one file, in eval mode and frozen; with ``cut`` a head alone.

        The file, ``model.safetensors``, is read whole. A family whose checkpoints have another layout, or are too large
        for that, overrides this. Raises :class:`WeightsError` for weights that are missing, truncated or of another
        architecture.
        """
        network = cls.build(record.architecture)
        read_weights(network, record, token=token, local_files_only=local_files_only)
        network.weights().to(device)
        network.net.to(dtype)
        if cut is None:
            return network
        head = network.prune(0, max(cut, 0))
        head.companions = network.companions
        return head

    def prune(self, start: int, stop: int, *, enter: bool = False) -> Self:
        """As in ``Sliced``. A part of a network without a record takes the companions along, opened or not: they could
        not be opened anew, should :func:`~stitchvm.core.latent_space.misfit` need them."""
        part = super().prune(start, stop, enter=enter)
        part._pruned_on = self.device
        if self.record is None:
            part.companions = self.companions
        return part

    # -- embedded guidance --------------------------------------------------------------------------------------------

    @property
    def own_guidance(self) -> float | None:
        """The embedded guidance that the network was loaded at, whatever it reads now; None if it reads none."""
        return self.guidance if self._loaded_at is None else self._loaded_at

    def with_embedded_guidance(self, scale: float | None) -> Self:
        """The backbone reading the guidance ``scale`` beside its time (None: its own): a copy that shares all tensors.

        Raises :class:`ConfigError` for a network that reads none, and a scale that is no finite number from 0 on.
        """
        if scale is None:
            scale = self.own_guidance
        elif self.guidance is None:
            raise ConfigError(
                f"{name_of(self)} has no embedded guidance to be set to {scale}; leave it out. guidance_scale is that "
                "of classifier-free guidance."
            )
        if scale == self.guidance:
            return self
        twin = copy.copy(self)
        twin.guidance, twin._loaded_at = float(checked_number("the embedded guidance", scale, 0)), self.own_guidance
        return twin

    # -- beside a pipeline --------------------------------------------------------------------------------------------

    def at_guidance(self, scale: float) -> tuple[Self, float]:
        """The backbone and the scale of classifier-free guidance that agree with a pipeline's ``guidance_scale``.

        A distilled network reads ``scale`` itself, if it reads any (:meth:`with_embedded_guidance`), and needs no
        second pass: 1. Other pipelines guide above 1 alone.
        """
        if self.guided_passes > 1:
            return self, max(scale, 1.0)
        return self if self.guidance is None else self.with_embedded_guidance(scale), 1.0

    def pipeline_sigmas(self, pipeline: Any) -> Tensor:
        """``[steps + 1]`` noise levels of a running call: of the latents before each of its timesteps, and after the
        last.

        A level that comes twice in a row ends a step which the scheduler then takes again (PNDM). Raises
        :class:`ConfigError` for a scheduler whose latents are not on this path.
        """
        raise ConfigError(f"{type(self).__name__} cannot read the noise levels of a {type(pipeline).__name__}.")

    def from_pipeline_latents(
        self, pipeline: Any, latents: Tensor, sigma: float, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The latents ``[B, C, h, w]`` at ``sigma`` that a pipeline's loop holds as ``latents``, differentiable.

        ``size`` is the image's height and width in pixels, None for the pipeline's own default. Raises
        :class:`ConfigError` for latents that are not of this size.
        """
        return latents

    def to_pipeline_latents(self, pipeline: Any, latents: Tensor, sigma: float) -> Tensor:
        """The inverse of :meth:`from_pipeline_latents`."""
        return latents
