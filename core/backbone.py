"""A diffusion backbone: a sliced denoiser, the path it lives on, its latents and its text conditioning."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import attrs
from torch import Tensor

from .conditions import Condition
from .costs import count
from .errors import SliceError
from .paths import Path, Prediction, PredictionKind, as_sigma
from .slicing import Sliced


@attrs.frozen(eq=False)
class NoisyLatent:
    """A backbone's input: ``latents [B, C, h, w]`` at noise level ``sigma [B]`` in [0, 1]."""

    latents: Tensor
    sigma: Tensor


class Backbone(Sliced):
    """A :class:`Sliced` denoiser whose ``x`` is a :class:`NoisyLatent` and whose condition is its prompt embeddings.

    A family sets ``path``, ``prediction`` (what the network's output means), ``latent_channels``, ``latent_factor``
    (image pixels per latent pixel) and ``native_resolution`` (image pixels), and writes what is abstract here and in
    ``Sliced``. The VAE and the text encoders are loaded on first use, so that a head alone never reads them. A stem
    takes a condition of one sample or of as many as there are latents (``condition.tensors_for(batch)``).
    ``guided_passes`` of the network make one guided step: two, with the prompt and without, unless it was distilled to
    need one.
    """

    guided_passes: ClassVar[int] = 2

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

    def denoise(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Prediction:
        """One full pass, counted as ``denoiser``, read as a :class:`Prediction`."""
        x = self.noisy(latents, sigma)
        count("denoiser", len(latents))
        output = self.resume(self.head(x, condition.expand(len(latents)), 0), 0)
        return self.path.interpret(self.prediction, output.to(latents.dtype), x.latents, x.sigma)
