"""A world in which everything is known in closed form: Gaussian latents, rewards of first and second moments.

``z0 ~ N(mean, spread^2)`` independently per element on the flow path, so the exact velocity is linear in ``z_t`` and
so are posterior, expected reward, soft value, tilted distribution and the marginals of every kernel at any number of
steps. Both networks are real :class:`Sliced` ones. The backbone's features hold ``z_t``, the noise level and the
posterior's moments, so a linear stitching layer can represent ``E[r(z0) | z_t]`` exactly.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..backbone import Backbone, NoisyLatent
from ..conditions import Condition
from ..costs import count
from ..errors import ConfigError
from ..estimators import Prompted
from ..kernels import Kernel
from ..paths import FlowPath, Prediction, as_sigma, spread
from ..reward import Reward, RewardOutput

CONTRAST = 20.0
"""Latent units across an image's [0, 1]: wide enough that no sample is ever clamped."""


class Carry(nn.Module):
    """A block that hands its state on unchanged, with a parameter, so that pruning and counting see it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Posterior(nn.Module):
    """The moments of ``z0`` given ``z_t`` under the prior ``N(mean, spread^2)``."""

    def __init__(self, channels: int, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((channels, 1, 1), mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, latents: Tensor, sigma: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``E[z0]``, ``E[eps]`` ``[B, C, h, w]`` and the variance of ``z0`` ``[B, 1, 1, 1]``."""
        level = spread(sigma, latents)
        alpha, variance = 1 - level, self.deviation**2
        mean = self.mean + spread(shift.flatten(), latents)
        total = alpha**2 * variance + level**2
        rest = (latents - alpha * mean) / total
        return mean + alpha * variance * rest, level * rest, variance * level**2 / total


class GaussianBackbone(Backbone):
    """The exact denoiser of Gaussian latents. A prompt that is a number shifts their mean by it; others do nothing."""

    net: Any
    prediction = "velocity"

    def __init__(self, *, mean: float = 0.3, deviation: float = 0.8, side: int = 2, channels: int = 3) -> None:
        net: Any = nn.Module()
        net.stem = Posterior(channels, mean, deviation)
        net.blocks = nn.ModuleList(Carry() for _ in range(3))
        net.exit = Carry()
        super().__init__(net)
        self.path = FlowPath()
        self.latent_channels, self.latent_factor, self.native_resolution = channels, 1, side
        self.requires_grad_(False)

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("stem",)

    @property
    def block_modules(self) -> tuple[str, ...]:
        return ("blocks.0", "blocks.1", "blocks.2")

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("exit",)

    def stem(self, x: NoisyLatent, condition: Condition) -> Tensor:
        """``[z_t, E[z0], E[eps], E[z0]^2, sigma, Var[z0]]`` along the channels: 4 C + 2 of them."""
        mean, eps, variance = self.net.stem(x.latents, x.sigma, condition["shift"])
        planes = [spread(x.sigma, x.latents), variance]
        one = torch.ones_like(x.latents[:, :1])
        return torch.cat([x.latents, mean, eps, mean**2, *(plane * one for plane in planes)], dim=1)

    def block(self, k: int, state: Tensor) -> Tensor:
        return self.net.blocks[k - 1](state)

    def exit(self, state: Tensor) -> Tensor:
        _, mean, eps, _ = self.net.exit(state)[:, :-2].chunk(4, dim=1)
        return eps - mean

    def grid(self, state: Tensor) -> Tensor:
        return state

    def example(self, batch: int = 1) -> tuple[NoisyLatent, Condition]:
        side = self.native_resolution
        latents = torch.zeros(batch, self.latent_channels, side, side, device=self.device)
        sigma = torch.full((batch,), 0.5, device=self.device)
        return NoisyLatent(latents, sigma), Condition({"shift": torch.zeros(batch, 1, device=self.device)})

    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        numbers = [float(p) if p.lstrip("-").replace(".", "", 1).isdigit() else 0.0 for p in prompts]
        return Condition({"shift": torch.tensor(numbers)[:, None]})

    def encode_images(self, images: Tensor) -> Tensor:
        count("encoder", len(images))
        return (images - 0.5) * CONTRAST

    def decode_latents(self, latents: Tensor) -> Tensor:
        count("decoder", len(latents))
        return latents / CONTRAST + 0.5

    def posterior(self, latents: Tensor, sigma: float | Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean ``[B, C, h, w]`` and variance ``[B, 1, 1, 1]`` of ``z0`` given ``z_t``."""
        shifts = torch.full((len(latents),), shift)
        mean, _, variance = self.net.stem(latents, as_sigma(sigma, latents), shifts)
        return mean, variance

    def draw(self, samples: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
        """Clean latents from the prior."""
        side = self.native_resolution
        noise = torch.randn(samples, self.latent_channels, side, side, generator=generator)
        return self.net.stem.mean + shift + self.net.stem.deviation * noise

    def marginal(self, kernel: Kernel, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel ``[C]`` of what ``kernel`` samples in these very steps, errors included."""
        side = self.native_resolution
        probes = torch.stack([level.expand(self.latent_channels, side, side) for level in torch.tensor([0.0, 1.0])])
        mean, variance = torch.zeros(self.latent_channels), torch.ones(self.latent_channels)
        for sigma, sigma_next in pairwise(sigmas):
            prediction: Prediction = self.denoise(probes, sigma, self.null_condition())
            step = kernel(prediction, as_sigma(sigma_next, probes))
            offset, slope = step.mean[0, :, 0, 0], (step.mean[1] - step.mean[0])[:, 0, 0]
            mean, variance = offset + slope * mean, slope**2 * variance + step.std[0] ** 2
        return mean, variance


class MomentReward(Reward):
    """``r(z0) = mean over positions of (first . z0 + second . z0^2) + constant``, read off images exactly."""

    net: Any
    prefix_count = 1
    condition_kind = "nothing"

    def __init__(self, first: list[float], second: list[float], constant: float = 0.0, side: int = 2) -> None:
        net: Any = nn.Module()
        net.patches = Carry()
        net.blocks = nn.ModuleList(Carry() for _ in range(2))
        net.score = nn.Linear(2 * len(first), 1)
        net.score.weight.data = torch.tensor([[*first, *second]])
        net.score.bias.data = torch.tensor([constant])
        super().__init__(net)
        self.image_size = self.grid_size = side
        self.requires_grad_(False)

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("patches",)

    @property
    def block_modules(self) -> tuple[str, ...]:
        return ("blocks.0", "blocks.1")

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("score",)

    def preprocess(self, images: Tensor) -> Tensor:
        return (images - 0.5) * CONTRAST

    def stem(self, x: Tensor, condition: object) -> Tensor:
        grid = self.net.patches(torch.cat([x, x**2], dim=1))
        return self.enter(grid, torch.zeros(1, grid.shape[1], device=grid.device))

    def block(self, k: int, state: Tensor) -> Tensor:
        return self.net.blocks[k - 1](state)

    def exit(self, state: Tensor) -> RewardOutput:
        embedding = state[:, 1:].mean(1)
        # Row by row: a matrix product rounds a single row in another way than many.
        score = (embedding * self.net.score.weight[0]).sum(1) + self.net.score.bias[0]
        return RewardOutput(state, embedding, score)

    def grid(self, state: Tensor) -> Tensor:
        return state[:, 1:].transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))

    def prefix(self, state: Tensor) -> Tensor:
        return state[:, :1]

    def enter(self, grid: Tensor, prefix: Tensor, *, positions: bool = False) -> Tensor:
        return torch.cat([prefix.expand(len(grid), -1, -1), grid.flatten(2).transpose(1, 2)], dim=1)

    def example(self, batch: int = 1) -> tuple[Tensor, None]:
        channels = self.net.score.weight.shape[1] // 2
        return torch.zeros(batch, channels, self.image_size, self.image_size, device=self.device), None

    def encode_prompts(self, prompts: list[str]) -> Condition:
        raise ConfigError("this reward has no text side.")

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        assert output.score is not None
        return output.score

    # -- closed forms

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """``first`` and ``second`` ``[C, 1, 1]`` and the constant."""
        first, second = self.net.score.weight[0].chunk(2)
        return first[:, None, None], second[:, None, None], self.net.score.bias[0]

    def expectation(self, mean: Tensor, variance: Tensor | float) -> Tensor:
        """``E[r]`` ``[B]`` for independent elements of these moments; with variance 0 the reward itself."""
        first, second, constant = self.coefficients()
        return (first * mean + second * (mean**2 + variance)).sum(1).mean((1, 2)) + constant

    def soft_expectation(self, mean: Tensor, variance: Tensor, strength: float) -> Tensor:
        """``log E[exp(strength r)]`` ``[B]`` for independent Gaussian elements."""
        first, second, constant = self.coefficients()
        positions = mean.shape[-2] * mean.shape[-1]
        a, b = strength * first / positions, strength * second / positions
        shrink = 1 - 2 * b * variance
        each = (a * mean + b * mean**2 + a**2 * variance / 2) / shrink - shrink.log() / 2
        return each.sum((1, 2, 3)) + strength * constant

    def tilted(self, mean: Tensor, variance: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel of ``N(mean, variance) exp(strength r)``, from ``[C]`` and ``[C]``."""
        first, second, _ = (c.flatten() for c in self.coefficients())
        positions = self.image_size**2
        precision = 1 / variance - 2 * strength * second / positions
        return (mean / variance + strength * first / positions) / precision, 1 / precision


class LinearReward(MomentReward):
    """``weight . z0``, averaged over positions: Tweedie's estimate is exact."""

    def __init__(self, weight: tuple[float, ...] = (1.0, -0.5, 0.25), side: int = 2) -> None:
        super().__init__(list(weight), [0.0] * len(weight), side=side)


class QuadraticReward(MomentReward):
    """``-scale |z0 - centre|^2``, averaged over positions: Tweedie is too high by ``scale C Var[z0 | z_t]``."""

    def __init__(self, centre: float = 0.6, scale: float = 1.0, side: int = 2, channels: int = 3) -> None:
        super().__init__([2 * scale * centre] * channels, [-scale] * channels, -scale * channels * centre**2, side=side)


@attrs.frozen(eq=False)
class ExactValue:
    """``E[r(z0) | z_t]`` as an estimator, under the unconditional prior; counts its calls' samples in ``seen``."""

    backbone: GaussianBackbone
    reward: MomentReward
    seen: list[int] = attrs.field(factory=list)

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        self.seen.append(len(latents))
        return self.reward.expectation(*self.backbone.posterior(latents, sigma))
