"""A world in which everything is known in closed form: Gaussian latents, rewards of first and second moments.

``z0 ~ N(mean, spread^2)`` independently per element, on the flow or the variance-preserving path, so the exact
prediction is linear in ``z_t`` and so are posterior, expected reward, soft value, tilted distribution and the marginals
of every kernel at any number of steps. Both networks are real :class:`Sliced` ones. The backbone's features hold
``z_t``, the noise level and the posterior's moments, so a linear stitching layer can represent ``E[r(z0) | z_t]``
exactly. Mixtures of Gaussians and another reward are in ``mixture``.
"""

from __future__ import annotations

from abc import abstractmethod
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
from ..paths import FlowPath, Path, Prediction, as_sigma, spread
from ..reward import Reward, RewardOutput

CONTRAST = 20.0
"""Latent units across an image's [0, 1]: wide enough that no sample is ever clamped."""

HIGHEST = 0.998
"""The highest noise level on the variance-preserving path, whose velocity is infinite at 1."""


class Carry(nn.Module):
    """A block that hands its state on unchanged, with a parameter, so that pruning and counting see it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Posterior(nn.Module):
    """The moments of ``z0`` given ``z_t`` under the prior ``N(mean, spread^2)``."""

    def __init__(self, channels: int, mean: float, deviation: float, path: Path) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((channels, 1, 1), mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))
        self.path = path

    def forward(self, latents: Tensor, sigma: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``E[z0]``, ``E[eps]``, ``E[z0]^2`` ``[B, C, h, w]`` and the variance of ``z0`` ``[B, 1, 1, 1]``."""
        level = spread(sigma, latents)
        alpha, variance = self.path.alpha(level), self.deviation**2
        prior = self.mean + spread(shift.flatten(), latents)
        total = alpha**2 * variance + level**2
        rest = (latents - alpha * prior) / total
        mean = prior + alpha * variance * rest
        return mean, level * rest, mean**2, variance * level**2 / total


class AnalyticBackbone(Backbone):
    """The exact denoiser of latents whose posterior is a mixture of Gaussians, on either path: velocity on the flow
    path, epsilon on the variance-preserving one. A prompt that is a number shifts all latents by it; others do nothing.

    ``posterior_of`` is the stem, a module that maps ``z_t``, ``sigma [B]`` and ``shift [B, 1]`` to ``E[z0]``,
    ``E[eps]``, the part of ``E[z0^2]`` beyond the variance that comes last ``[B, 1, 1, 1]``.
    """

    net: Any

    def __init__(self, posterior_of: nn.Module, side: int, channels: int, path: Path) -> None:
        net: Any = nn.Module()
        net.stem = posterior_of
        net.blocks = nn.ModuleList(Carry() for _ in range(3))
        net.exit = Carry()
        super().__init__(net)
        self.path = path
        self.prediction = "velocity" if isinstance(path, FlowPath) else "epsilon"
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
        """``[z_t, E[z0], E[eps], E[z0^2] - variance, sigma, variance]`` along the channels: 4 C + 2 of them."""
        mean, eps, square, variance = self.net.stem(x.latents, x.sigma, condition["shift"])
        planes = [spread(x.sigma, x.latents), variance]
        one = torch.ones_like(x.latents[:, :1])
        return torch.cat([x.latents, mean, eps, square, *(plane * one for plane in planes)], dim=1)

    def block(self, k: int, state: Tensor) -> Tensor:
        return self.net.blocks[k - 1](state)

    def exit(self, state: Tensor) -> Tensor:
        _, mean, eps, _ = self.net.exit(state)[:, :-2].chunk(4, dim=1)
        return eps - mean if self.prediction == "velocity" else eps

    def grid(self, state: Tensor) -> Tensor:
        return state

    def example(self, batch: int = 1) -> tuple[NoisyLatent, Condition]:
        side = self.native_resolution
        latents = torch.zeros(batch, self.latent_channels, side, side, device=self.device)
        sigma = torch.full((batch,), 0.5, device=self.device)
        return NoisyLatent(latents, sigma), Condition({"shift": torch.zeros(batch, 1, device=self.device)})

    def noisy(self, latents: Tensor, sigma: float | Tensor) -> NoisyLatent:
        """As :meth:`Backbone.noisy`, with levels above ``HIGHEST`` read as that one on the variance-preserving path."""
        x = super().noisy(latents, sigma)
        return x if self.prediction == "velocity" else attrs.evolve(x, sigma=x.sigma.clamp_max(HIGHEST))

    def sigmas(self, steps: int, latent_shape: tuple[int, int]) -> Tensor:
        """Evenly spaced from 1 to 0 on the flow path; ``sin`` of evenly spaced angles, from ``HIGHEST``, on the other,
        where ``z_t`` moves evenly with the angle."""
        even = torch.linspace(1, 0, steps + 1)
        return even if self.prediction == "velocity" else (even * torch.tensor(HIGHEST).arcsin()).sin()

    def encode_prompts(self, prompts: list[str]) -> Condition:
        numbers = [float(p) if p.lstrip("-").replace(".", "", 1).isdigit() else 0.0 for p in prompts]
        return Condition({"shift": torch.tensor(numbers)[:, None]})

    def encode_images(self, images: Tensor) -> Tensor:
        count("encoder", len(images))
        return (images - 0.5) * CONTRAST

    def decode_latents(self, latents: Tensor) -> Tensor:
        count("decoder", len(latents))
        return latents / CONTRAST + 0.5

    # -- closed forms

    @abstractmethod
    def components(
        self, latents: Tensor, sigma: float | Tensor, shift: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior of ``z0`` given ``z_t`` as a mixture of K Gaussians of independent elements: log weights ``[B,
        K]``, means ``[B, K, C, h, w]`` and their common variance ``[B, 1, 1, 1]``. ``shift``: a number or ``[B]``."""

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
        """Clean latents ``[samples, C, h, w]`` from the prior."""

    @abstractmethod
    def posterior(self, latents: Tensor, sigma: float | Tensor, shift: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Mean ``[B, C, h, w]`` of ``z0`` given ``z_t`` and the variance of its elements, which broadcasts to it."""


class GaussianBackbone(AnalyticBackbone):
    """The exact denoiser of Gaussian latents, on the flow path by default."""

    def __init__(
        self,
        *,
        mean: float = 0.3,
        deviation: float = 0.8,
        side: int = 2,
        channels: int = 3,
        path: Path | None = None,
    ) -> None:
        path = path or FlowPath()
        super().__init__(Posterior(channels, mean, deviation, path), side, channels, path)

    def components(
        self, latents: Tensor, sigma: float | Tensor, shift: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = self.posterior(latents, sigma, shift)
        return torch.zeros_like(mean[:, :1, 0, 0]), mean[:, None], variance

    def posterior(self, latents: Tensor, sigma: float | Tensor, shift: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Mean ``[B, C, h, w]`` and variance ``[B, 1, 1, 1]`` of ``z0`` given ``z_t``."""
        shifts = torch.as_tensor(shift, dtype=latents.dtype).expand(len(latents))
        mean, _, _, variance = self.net.stem(latents, as_sigma(sigma, latents), shifts)
        return mean, variance

    def draw(self, samples: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
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


class AnalyticReward(Reward):
    """A function of the moments ``mean over positions of (z0, z0^2)``, read off images exactly: ``outputs`` linear ones
    of them ``[B, outputs]`` (``weight [outputs, 2 C]``, ``bias [outputs]``) and what :meth:`combine` makes of these."""

    net: Any
    prefix_count = 1
    condition_kind = "nothing"

    def __init__(self, weight: Tensor, bias: Tensor, side: int) -> None:
        net: Any = nn.Module()
        net.patches = Carry()
        net.blocks = nn.ModuleList(Carry() for _ in range(2))
        net.score = nn.Linear(weight.shape[1], weight.shape[0])
        net.score.weight.data, net.score.bias.data = weight, bias
        super().__init__(net)
        self.image_size = self.grid_size = side
        self.requires_grad_(False)

    @abstractmethod
    def combine(self, linear: Tensor) -> Tensor:
        """The reward ``[B]`` from the linear functions ``[B, outputs]``."""

    @abstractmethod
    def expectation(self, mean: Tensor, variance: Tensor | float) -> Tensor:
        """``E[r]`` ``[B]`` for independent Gaussian elements of these moments (``[B, C, h, w]`` and what broadcasts to
        it); with variance 0 the reward itself."""

    @abstractmethod
    def soft_expectation(self, mean: Tensor, variance: Tensor, strength: float) -> Tensor:
        """``log E[exp(strength r)]`` ``[B]`` for independent Gaussian elements."""

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
        linear = [(embedding * weight).sum(1) for weight in self.net.score.weight]
        return RewardOutput(state, embedding, self.combine(torch.stack(linear, 1) + self.net.score.bias))

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


class MomentReward(AnalyticReward):
    """``r(z0) = mean over positions of (first . z0 + second . z0^2) + constant``."""

    def __init__(self, first: list[float], second: list[float], constant: float = 0.0, side: int = 2) -> None:
        super().__init__(torch.tensor([[*first, *second]]), torch.tensor([constant]), side)

    def combine(self, linear: Tensor) -> Tensor:
        return linear[:, 0]

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """``first`` and ``second`` ``[C, 1, 1]`` and the constant."""
        first, second = self.net.score.weight[0].chunk(2)
        return first[:, None, None], second[:, None, None], self.net.score.bias[0]

    def expectation(self, mean: Tensor, variance: Tensor | float) -> Tensor:
        first, second, constant = self.coefficients()
        return (first * mean + second * (mean**2 + variance)).sum(1).mean((1, 2)) + constant

    def soft_expectation(self, mean: Tensor, variance: Tensor, strength: float) -> Tensor:
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
    """``E[r(z0) | z_t]``, or ``soft`` ``(1 / strength) log E[exp(strength r(z0)) | z_t]``, as an estimator; counts its
    calls' samples in ``seen``.

    Under the unconditional prior; ``prompted``: under that of the sampler's own prompt (without guidance).
    """

    backbone: AnalyticBackbone
    reward: AnalyticReward
    soft: bool = False
    strength: float = 1.0
    prompted: bool = False
    seen: list[int] = attrs.field(factory=list)

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        self.seen.append(len(latents))
        shift = context.denoiser.condition["shift"].flatten() if self.prompted else 0.0
        logs, means, variance = self.backbone.components(latents, sigma, shift)
        flat, variance = means.flatten(0, 1), variance.repeat_interleave(logs.shape[1], 0)
        if self.soft:
            each = self.reward.soft_expectation(flat, variance, self.strength)
            return (logs + each.view_as(logs)).logsumexp(1) / self.strength
        return (logs.exp() * self.reward.expectation(flat, variance).view_as(logs)).sum(1)
