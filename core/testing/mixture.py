"""More of the analytic world: latents of several modes, and a reward whose soft value alone is a closed form.

A mixture's exact denoiser is not linear in ``z_t``, so that Tweedie's estimate and a sampler's discretisation err as
they do on real data, while posterior, expected reward, soft value and tilted distribution stay sums over components.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..paths import FlowPath, Path, as_sigma, spread
from .gaussian import AnalyticBackbone, AnalyticReward, MomentReward

NODES = 64
"""Of the Gauss-Hermite quadrature: exact to 1e-6 up to a deviation of 3 between the two terms."""


class MixturePosterior(nn.Module):
    """The moments of ``z0`` given ``z_t`` under ``sum_k weights_k N(means_k, deviation^2)``, ``k`` drawn once a latent.

    ``means [K, C]`` are those of every position.
    """

    def __init__(self, means: Tensor, weights: Tensor, deviation: float, path: Path) -> None:
        super().__init__()
        self.means = nn.Parameter(means[:, :, None, None])
        self.log_weights = nn.Parameter(weights.log())
        self.deviation = nn.Parameter(torch.tensor(deviation))
        self.path = path

    def components(self, latents: Tensor, sigma: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log weights ``[B, K]``, means of ``z0`` and ``eps`` ``[B, K, C, h, w]``, variance of ``z0`` ``[B, 1, 1,
        1]``."""
        level = spread(sigma, latents)
        alpha, variance = self.path.alpha(level), self.deviation**2
        total = alpha**2 * variance + level**2
        priors = self.means + spread(shift.flatten(), self.means[None])
        rest = (latents[:, None] - alpha[:, None] * priors) / total[:, None]
        distance = (rest**2 * total[:, None]).sum((2, 3, 4))
        logs = (self.log_weights - distance / 2).log_softmax(1)
        means, eps = priors + alpha[:, None] * variance * rest, level[:, None] * rest
        return logs, means, eps, variance * level**2 / total

    def forward(self, latents: Tensor, sigma: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``E[z0]``, ``E[eps]``, ``E[z0^2]`` less the variance within a component ``[B, C, h, w]``, and that variance
        ``[B, 1, 1, 1]``."""
        logs, means, eps, variance = self.components(latents, sigma, shift)
        weights = logs.exp()[:, :, None, None, None]
        mean, noise, square = ((weights * each).sum(1) for each in (means, eps, means**2))
        return mean, noise, square, variance


class MixtureBackbone(AnalyticBackbone):
    """The exact denoiser of ``sum_k weights_k N(means_k, deviation^2)``, on the flow path by default.

    ``means``: K lists of one mean a channel; ``weights``: K, of any sum. Raises :class:`ConfigError` when they do not
    fit each other or a weight is not above 0.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] = ((-1.0, 0.5, 0.0), (1.0, 0.0, -0.5)),
        weights: Sequence[float] = (0.3, 0.7),
        *,
        deviation: float = 0.4,
        side: int = 2,
        path: Path | None = None,
    ) -> None:
        if len(means) != len(weights) or not means or len({len(mean) for mean in means}) != 1 or min(weights) <= 0:
            raise ConfigError(
                f"a mixture needs a weight above 0 for each of its means, which are of one length; got means {means}, "
                f"weights {weights}."
            )
        path, shares = path or FlowPath(), torch.tensor(weights, dtype=torch.float32)
        stem = MixturePosterior(torch.tensor(means), shares / shares.sum(), deviation, path)
        super().__init__(stem, side, len(means[0]), path)

    def components(
        self, latents: Tensor, sigma: float | Tensor, shift: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        shifts = torch.as_tensor(shift, dtype=latents.dtype).expand(len(latents))
        logs, means, _, variance = self.net.stem.components(latents, as_sigma(sigma, latents), shifts)
        return logs, means, variance

    def posterior(self, latents: Tensor, sigma: float | Tensor, shift: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        logs, means, variance = self.components(latents, sigma, shift)
        weights = logs.exp()[:, :, None, None, None]
        mean = (weights * means).sum(1)
        return mean, variance + (weights * (means - mean[:, None]) ** 2).sum(1)

    def draw(self, samples: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
        stem, side = self.net.stem, self.native_resolution
        chosen = torch.multinomial(stem.log_weights.exp(), samples, replacement=True, generator=generator)
        noise = torch.randn(samples, self.latent_channels, side, side, generator=generator)
        return stem.means[chosen] + shift + stem.deviation * noise

    def tilted(self, reward: MomentReward, strength: float) -> tuple[Tensor, Tensor, Tensor]:
        """The prior times ``exp(strength r)``, a mixture again: weights ``[K]``, means ``[K, C]`` and variance ``[C]``.

        A linear reward moves all means alike and the weights by how much each component gains.
        """
        stem, side = self.net.stem, self.native_resolution
        variance = (stem.deviation**2).expand(self.latent_channels)
        gains = reward.soft_expectation(stem.means.expand(-1, -1, side, side), variance[:, None, None], strength)
        moved = [reward.tilted(mean.flatten(), variance, strength) for mean in stem.means]
        return (stem.log_weights + gains).softmax(0), torch.stack([mean for mean, _ in moved]), moved[0][1]


class LogSumExpReward(AnalyticReward):
    """``r(z0) = log sum_j exp(slopes_j . zbar + offsets_j)``, ``zbar [C]`` the mean of ``z0`` over positions: convex,
    so that Tweedie's estimate is too low.

    At strength 1 the soft value is a closed form: ``E[exp r] = sum_j exp(offsets_j) E[exp(slopes_j . zbar)]``. The
    standard one is by quadrature, for one or two terms.
    """

    def __init__(
        self,
        slopes: Sequence[Sequence[float]] = ((1.0, 0.5, 0.0), (-1.0, 0.0, 0.5)),
        offsets: Sequence[float] = (0.0, 0.3),
        side: int = 2,
    ) -> None:
        weight = torch.tensor([[*slope, *[0.0] * len(slope)] for slope in slopes])
        super().__init__(weight, torch.tensor(offsets), side)

    def combine(self, linear: Tensor) -> Tensor:
        return linear.logsumexp(1)

    def _terms(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """``slopes [J, C]`` and the terms at a mean ``[B, J]``."""
        slopes = self.net.score.weight.chunk(2, dim=1)[0]
        return slopes, (mean.mean((2, 3))[:, None] * slopes).sum(2) + self.net.score.bias

    def _variance_of(self, slopes: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
        """``Var[slopes . zbar]`` ``[B, J]`` for independent elements."""
        elements = torch.as_tensor(variance, dtype=mean.dtype).expand_as(mean)
        positions = mean.shape[2] * mean.shape[3]
        return (elements.mean((2, 3))[:, None] * slopes**2).sum(2) / positions

    def expectation(self, mean: Tensor, variance: Tensor | float) -> Tensor:
        """``E[r]`` ``[B]`` by Gauss-Hermite quadrature: ``r`` is the first term and ``softplus`` of the second less the
        first, which is Gaussian.

        Raises :class:`ConfigError` for more than two terms.
        """
        slopes, terms = self._terms(mean)
        if len(slopes) > 2:
            raise ConfigError(
                f"the mean of a log of {len(slopes)} terms has no closed form; take 1 or 2, or soft=True."
            )
        if len(slopes) == 1:
            return terms[:, 0]
        gap = terms[:, 1] - terms[:, 0]
        deviation = self._variance_of(slopes[1:] - slopes[:1], mean, variance)[:, 0].clamp_min(1e-30).sqrt()
        nodes, weights = (torch.as_tensor(x, dtype=mean.dtype) for x in np.polynomial.hermite_e.hermegauss(NODES))
        points = gap[:, None] + deviation[:, None] * nodes
        return terms[:, 0] + (nn.functional.softplus(points) * weights / weights.sum()).sum(1)

    def soft_expectation(self, mean: Tensor, variance: Tensor, strength: float) -> Tensor:
        """``log E[exp(strength r)]`` ``[B]``. Raises :class:`ConfigError` for a strength other than 1."""
        if strength != 1:
            raise ConfigError(f"the soft value of LogSumExpReward is a closed form at strength 1, not at {strength}.")
        slopes, terms = self._terms(mean)
        return (terms + self._variance_of(slopes, mean, variance) / 2).logsumexp(1)
