"""Closed-form least squares from streamed sufficient statistics (paper, section 2).

One pass accumulates Gram matrices in float64, centred on the first batch's mean so that large offsets cost no digits.
Memory depends on the numbers of channels only, never on how many samples went by.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from ..errors import DataError

RANK_TOLERANCE = 1e-12
"""Eigenvalues of the Gram matrix below this share of the largest count as zero (singular values below 1e-6)."""


@attrs.frozen(eq=False)
class AffineMap:
    """``y = weight x + bias`` and how well it fits: ``weight [c_out, c_in]``, ``bias [c_out]``, all float64.

    ``error [c_out]`` is each output's mean squared residual over what was streamed, ``variance [c_out]`` that of its
    best constant.
    """

    weight: Tensor
    bias: Tensor
    error: Tensor
    variance: Tensor

    def outputs(self, chosen: slice) -> AffineMap:
        """The map to some of the outputs."""
        return AffineMap(self.weight[chosen], self.bias[chosen], self.error[chosen], self.variance[chosen])

    @property
    def mse(self) -> float:
        """The paper's criterion: mean squared error per entry."""
        return float(self.error.mean())

    @property
    def unexplained(self) -> float:
        """Share of the target's variance left over, in [0, 1]: comparable between targets of different scale."""
        return float(self.error.sum() / self.variance.sum().clamp_min(torch.finfo(torch.float64).tiny))


@attrs.frozen(eq=False)
class _Sums:
    """Running sums about fixed origins; mutated in place."""

    source_origin: Tensor
    target_origin: Tensor
    source: Tensor
    target: Tensor
    gram: Tensor
    cross: Tensor
    square: Tensor

    @classmethod
    def about(cls, source: Tensor, target: Tensor) -> _Sums:
        x, y = source.mean(0), target.mean(0)
        return cls(
            x, y, torch.zeros_like(x), torch.zeros_like(y),
            x.new_zeros(len(x), len(x)), x.new_zeros(len(x), len(y)), torch.zeros_like(y),
        )  # fmt: skip


@attrs.define(eq=False)
class RegressionStatistics:
    """Sufficient statistics of the regression of ``target [n, c_out]`` on ``source [n, c_in]``."""

    rows: int = 0
    _sums: _Sums | None = None

    def add(self, source: Tensor, target: Tensor) -> None:
        """Take in rows ``source [n, c_in]`` and ``target [n, c_out]``."""
        x, y = source.double(), target.double()
        sums = self._sums = self._sums or _Sums.about(x, y)
        x, y = x - sums.source_origin, y - sums.target_origin
        self.rows += len(x)
        sums.source.add_(x.sum(0))
        sums.target.add_(y.sum(0))
        sums.gram.addmm_(x.T, x)
        sums.cross.addmm_(x.T, y)
        sums.square.add_(y.square().sum(0))

    def solve(self) -> AffineMap:
        """The least-squares map with an intercept, of minimum norm where the centred source is rank deficient.

        Raises :class:`DataError` when nothing was added.
        """
        if self._sums is None:
            raise DataError("no probe features were collected, so there is nothing to fit; give at least one image.")
        sums, n = self._sums, self.rows
        mean_x, mean_y = sums.source / n, sums.target / n
        gram = sums.gram - n * torch.outer(mean_x, mean_x)
        cross = sums.cross - n * torch.outer(mean_x, mean_y)
        values, vectors = torch.linalg.eigh(gram)
        keep = values > RANK_TOLERANCE * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        inverse = torch.where(keep, values, torch.inf).reciprocal()
        weight = (vectors * inverse) @ (vectors.T @ cross)
        variance = sums.square / n - mean_y.square()
        error = (variance - (weight * cross).sum(0) / n).clamp_min(0)
        bias = mean_y + sums.target_origin - (mean_x + sums.source_origin) @ weight
        return AffineMap(weight.T.contiguous(), bias, error, variance)
