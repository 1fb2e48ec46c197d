"""Mistakes that only a backbone can make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import toys
from mutant_networks import Itself
from stitchvm.core import Condition, NoisyLatent, SliceError, as_sigma

BACKBONES: dict[str, Callable[[], Any]] = {}


def breaks(check: str) -> Any:
    """Register a class of a broken network, or a function that makes one, for the check that must catch it."""

    def register(mutant: Any) -> Any:
        BACKBONES[check] = (lambda: toys.make(mutant)) if isinstance(mutant, type) else mutant
        return mutant

    return register


@breaks("samples-apart")
class _OneNoiseLevelForAll(Itself, toys.Backbone):
    def stem(self, x, condition):
        return super().stem(NoisyLatent(x.latents, x.sigma.mean().expand(len(x.sigma))), condition)


@breaks("orientation")
class _MirroredBackbone(toys.Backbone):
    def grid(self, state):
        return super().grid(state).flip(3)


@breaks("declares")
def _odd_resolution():
    backbone = toys.make(toys.Backbone)
    backbone.native_resolution = 33
    return backbone


@breaks("predicts-latents")
class _OneChannel(Itself, toys.Backbone):
    def exit(self, state):
        return super().exit(state).mean(1, keepdim=True)


@breaks("rectangles")
class _SwappedSides(toys.Backbone):
    def grid(self, state):
        patches = super().grid(state)
        return patches.reshape(*patches.shape[:2], patches.shape[3], patches.shape[2])


@breaks("chosen-states")
class _TableInState(toys.Backbone):
    """A table that all samples share lies in the state as if it were one row a sample."""

    def stem(self, x, condition):
        return (*super().stem(x, condition), torch.ones(1))

    def block(self, k, state):
        return (*super().block(k, state[:2]), state[2])


@breaks("reads-noise-level")
class _DeafToNoise(Itself, toys.Backbone):
    def stem(self, x, condition):
        return super().stem(NoisyLatent(x.latents, torch.zeros_like(x.sigma)), condition)


@breaks("every-noise-level")
class _Logarithm(Itself, toys.Backbone):
    def stem(self, x, condition):
        return super().stem(NoisyLatent(x.latents, x.sigma.log()), condition)


@breaks("sigmas")
class _RisingLevels(toys.Backbone):
    def sigmas(self, steps, latent_shape):
        return super().sigmas(steps, latent_shape).flip(0)


@breaks("prompts")
class _OneEmbedding(toys.Backbone):
    def encode_prompts(self, prompts):
        return super().encode_prompts(["a cat"] * len(prompts))


@breaks("reads-condition")
class _DeafToPrompts(Itself, toys.Backbone):
    def stem(self, x, condition):
        text = torch.zeros_like(condition["text"])
        return super().stem(x, Condition({"text": text}))


@breaks("null-condition")
class _TwoNulls(toys.Backbone):
    def null_condition(self):
        return self.encode_prompts(["", ""])


@breaks("one-prompt-for-all")
class _OnePromptALatent(toys.Backbone):
    def stem(self, x, condition):
        if len(condition) != len(x.latents):
            raise SliceError("one prompt a latent, please.")
        return super().stem(x, condition)


@breaks("another-number-of-prompts")
class _RepeatsPrompts(toys.Backbone):
    def stem(self, x, condition):
        return super().stem(x, condition.index([k % len(condition) for k in range(len(x.latents))]))


@breaks("wrong-channels")
class _TakesAnything(toys.Backbone):
    def noisy(self, latents, sigma):
        return NoisyLatent(latents, as_sigma(sigma, latents))


@breaks("wrong-noise-level")
class _ClampsNoise(toys.Backbone):
    def noisy(self, latents, sigma):
        return super().noisy(latents, torch.as_tensor(sigma).clamp(0, 1))


@breaks("autoencoder")
class _MeanAndVariance(toys.Backbone):
    def encode_images(self, images):
        return super().encode_images(images).repeat(1, 2, 1, 1)


@breaks("decoder-gradient")
class _DecodesWithoutGradient(toys.Backbone):
    @torch.no_grad()
    def decode_latents(self, latents):
        return super().decode_latents(latents)


@breaks("costs")
class _DecodesForFree(toys.Backbone):
    def decode_latents(self, latents):
        return self.companions["autoencoder"].up(latents) / 2 + 0.5


@breaks("deterministic")
class _SamplesThePosterior(toys.Backbone):
    draws = 0

    def encode_images(self, images):
        self.draws += 1
        noise = torch.Generator().manual_seed(self.draws)
        latents = super().encode_images(images)
        return latents + 0.01 * torch.randn(latents.shape, generator=noise)
