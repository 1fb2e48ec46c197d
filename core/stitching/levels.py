"""Balance of stage 2's noise levels: what nobody can know at high noise must not drown what can be learnt at low."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import attrs
import torch
from accelerate import Accelerator
from torch import Tensor

LEVELS = 10
"""Bins of equal width on [0, 1]."""

MEMORY = 0.9
"""Of the running means, a step."""

Weigh = Callable[[str, Tensor], Tensor]
"""``(term, errors [B]) -> [B]``."""


def unweighted(term: str, errors: Tensor) -> Tensor:
    """Every example counts the same."""
    return errors


@attrs.define(eq=False)
class LevelBalance:
    """Running means of each term's errors by bin, ``means [terms, 2 * LEVELS]`` (NaN where nothing was seen yet); an
    example counts by the inverse of its bin's.

    A bin is a noise level and whether the head reads a prompt, which is all that a weight may depend on: given what
    the value sees the weight is a constant, and the minimiser stays ``E[r(z0) | z_t]``. The mean weight of the bins
    seen is 1. Weights come from earlier steps alone.
    """

    terms: tuple[str, ...]
    means: Tensor
    _sums: Tensor
    _counts: Tensor

    @classmethod
    def of(cls, terms: Sequence[str], device: torch.device) -> Self:
        """Nothing seen yet."""
        shape = (len(terms), 2 * LEVELS)
        unseen = torch.full(shape, torch.nan, device=device)
        return cls(tuple(terms), unseen, torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    @staticmethod
    def bins(sigma: Tensor, prompted: Tensor) -> Tensor:
        """``[B]``: the bins of examples at noise levels ``sigma [B]``."""
        return (sigma * LEVELS).long().clamp(0, LEVELS - 1) + LEVELS * prompted.long()

    def weigher(self, prefix: str, bins: Tensor) -> Weigh:
        """Weighs the errors of the terms ``PREFIX/...`` of examples in ``bins [B]`` and takes note of them."""

        def weigh(term: str, errors: Tensor) -> Tensor:
            row = self.terms.index(f"{prefix}/{term}")
            self._sums[row].index_add_(0, bins, errors.detach())
            self._counts[row].index_add_(0, bins, torch.ones_like(errors))
            weights = self._weights(row)[bins]
            return errors * weights

        return weigh

    def _weights(self, row: int) -> Tensor:
        seen = ~self.means[row].isnan()
        if not bool(seen.any()):
            return torch.ones_like(self.means[row])
        inverse = 1 / self.means[row].clamp_min(1e-12)
        mean = inverse[seen].mean()
        return torch.where(seen, inverse / mean, 1.0)

    def update(self, accelerator: Accelerator) -> None:
        """Take the noted errors of all processes into the means."""
        sums, counts = (accelerator.reduce(each, "sum") for each in (self._sums, self._counts))
        fresh = sums / counts
        blended = MEMORY * self.means + (1 - MEMORY) * fresh
        known = torch.where(self.means.isnan(), fresh, blended)
        self.means = torch.where(counts > 0, known, self.means)
        self._sums.zero_()
        self._counts.zero_()
