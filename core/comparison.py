"""Means with their standard errors, and gains paired by prompt and seed: what every result is reported as."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

from .errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen
class MeanStderr:
    """A mean and its standard error: the sample standard deviation over ``sqrt(n)``, None from a single value."""

    mean: float
    stderr: float | None

    def report(self) -> dict[str, float | None]:
        """JSON-able: ``mean`` and ``stderr``."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.stderr is None else f"{self.mean:.4g} ± {self.stderr:.2g}"


def mean_stderr(values: Iterable[float] | Tensor) -> MeanStderr:
    """Mean and standard error of independent ``values`` (a list or a tensor ``[n]``, booleans count as 0 and 1).

    Raises :class:`DataError` when there is none, or one that is not finite.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise DataError("there is no value to average.")
    if not all(map(math.isfinite, numbers)):
        raise DataError("a value to average is not finite.")
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1:
        return MeanStderr(mean, None)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    return MeanStderr(mean, math.sqrt(variance / len(numbers)))


def paired_gain(values: Iterable[float] | Tensor, base: Iterable[float] | Tensor) -> MeanStderr:
    """Mean and standard error of ``values - base``, entry by entry: the same prompt and seed stand in the same place.

    What prompts have in common cancels, so the error is that of the difference and not of either mean.
    Raises :class:`DataError` when the two differ in number.
    """
    return mean_stderr(value - other for value, other in _paired(values, base))


def paired_share(values: Iterable[float] | Tensor, base: Iterable[float] | Tensor) -> MeanStderr | None:
    """The mean of ``values`` as a share of that of ``base``, paired as :func:`paired_gain`'s; None where ``base`` has a
    mean of 0.

    The standard error is that of a ratio ``R`` of means to first order, ``sd(v - R b) / (|mean b| sqrt n)``: read it
    where the mean of ``base`` is several of its own errors away from 0.
    """
    pairs = _paired(values, base)
    top, bottom = (mean_stderr(side).mean for side in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if bottom == 0:
        return None
    share = top / bottom
    rest = mean_stderr(value - share * other for value, other in pairs).stderr
    return MeanStderr(share, None if rest is None else rest / abs(bottom))


def _paired(values: Iterable[float] | Tensor, base: Iterable[float] | Tensor) -> list[tuple[float, float]]:
    pairs = [float(value) for value in values], [float(value) for value in base]
    if len(pairs[0]) != len(pairs[1]):
        counts = f"{len(pairs[0])} values with {len(pairs[1])}"
        raise DataError(f"cannot pair {counts}; run both on the same prompts and seeds.")
    return list(zip(*pairs, strict=True))


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> MeanStderr:
    """Mean of ``values``, and its standard error where those of one cluster depend on each other, as two seeds of one
    prompt do: ``sqrt(C / (C - 1) sum_c (sum_{i in c} (v_i - mean))^2) / n`` over ``C`` clusters.

    That of :func:`mean_stderr` where every value is a cluster by itself; None from a single cluster. Raises
    :class:`DataError` as that does, and where the two differ in number.
    """
    if len(values) != len(clusters):
        raise DataError(f"cannot tell the clusters of {len(values)} values by {len(clusters)} names.")
    mean = mean_stderr(values).mean
    sums: defaultdict[str, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    if len(sums) == 1:
        return MeanStderr(mean, None)
    spread = math.fsum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return MeanStderr(mean, math.sqrt(spread) / len(values))
