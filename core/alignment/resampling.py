"""Resampling: which particles survive, and how often, given their weights.

Every resampler is unbiased, ``E[count] = N w``, and never draws a particle of weight zero; they differ in how far a
count may be from that (Gerber, Chopin and Whiteley 2019; Douc, Cappé and Moulines 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError

Resampler = Callable[[Tensor, torch.Generator], Tensor]
"""``resampler(weights [N], generator) -> ancestors [N]`` on the CPU, with expected counts ``N weights``.

``generator`` is the only randomness, on the CPU. The weights need not sum to 1. Raises :class:`ConfigError` for weights
that are negative, not finite or all zero.
"""

_LAST = math.nextafter(1.0, 0.0)
_ROUNDING = 1e-6
"""In copies: so close below a whole number, ``N w`` is that number, or float32 weights of 1/N might lose their copy."""


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """``1 / sum w^2`` of the normalised weights: ``[..., N]`` to ``[...]``, between 1 and N."""
    return 1 / log_weights.double().softmax(-1).square().sum(-1)


def multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Independent draws with replacement, as published with FK steering."""
    return _invert(_normalised(weights), torch.rand(len(weights), generator=generator, dtype=torch.float64))


def stratified(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One independent draw in each of N equal strata: a count differs from ``N w`` by less than two."""
    offsets = torch.rand(len(weights), generator=generator, dtype=torch.float64)
    return _comb(weights, offsets)


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform draw on a comb of N teeth: a count differs from ``N w`` by less than one."""
    return _comb(weights, torch.rand(1, generator=generator, dtype=torch.float64))


def residual(weights: Tensor, generator: torch.Generator) -> Tensor:
    """``floor(N w)`` copies for sure, the rest multinomial of what the floors left (Liu and Chen 1998)."""
    counts, fractions = _copies(weights)
    sure = torch.arange(len(counts)).repeat_interleave(counts)
    missing = len(counts) - len(sure)
    if not missing:
        return sure
    return torch.cat([sure, _invert(fractions, torch.rand(missing, generator=generator, dtype=torch.float64))])


def ssp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Srinivasan sampling process: every count is ``floor(N w)`` or ``ceil(N w)``. Counts are negatively associated,
    which systematic's need not be (Gerber, Chopin and Whiteley 2019).

    Two fractions at a time meet; one leaves as a whole number, 0 or 1, the other takes the difference along.
    """
    counts, fractions = _copies(weights)
    draws = torch.rand(len(counts) - 1, generator=generator, dtype=torch.float64).tolist()
    held, *others = fractions.tolist()
    holder = 0  # the particle whose fraction is still open
    for other, (share, draw) in enumerate(zip(others, draws, strict=True), 1):
        total = held + share
        if total < 1:
            # One leaves with 0; each stays in proportion to its fraction.
            stays = draw * total < held
            held = total
        else:
            # One leaves with 1; each stays in proportion to what its fraction lacks.
            stays = draw * (2 - total) >= 1 - share
            counts[other if stays else holder] += 1
            held = total - 1
        holder = holder if stays else other
    # What is held now is a whole number up to rounding, and the counts say which.
    counts[holder] += len(counts) - int(counts.sum())
    return torch.arange(len(counts)).repeat_interleave(counts)


RESAMPLERS: dict[str, Resampler] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


def draw_ancestors(
    log_weights: Tensor, resampler: str, ess_threshold: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """Effective sample sizes ``[P]``, which prompts are resampled ``[P]`` and ancestors ``[P, N]``, the identity where
    not: those prompts, each by its generator, whose size is at most ``ess_threshold`` of the particles."""
    particles, size = log_weights.shape[1], effective_sample_size(log_weights)
    # Rounding may put the size of equal weights a hair above N, and 1 means always.
    chosen = size <= ess_threshold * particles * (1 + 1e-9)
    ancestors = torch.arange(particles).repeat(len(chosen), 1)
    for prompt in chosen.nonzero().flatten().tolist():
        ancestors[prompt] = RESAMPLERS[resampler](log_weights[prompt].softmax(0), generators[prompt])
    return size, chosen, ancestors


def _normalised(weights: Tensor) -> Tensor:
    """The weights in float64 on the CPU, summing to 1."""
    known = weights.detach().double().cpu()
    total = known.sum()
    if not bool((known >= 0).all() and total > 0 and total.isfinite()):
        raise ConfigError(
            f"resampling weights must be finite, not negative and not all zero, got {known.tolist()}. "
            "Take the softmax of log-weights, of which at least one is finite."
        )
    return known / total


def _copies(weights: Tensor) -> tuple[Tensor, Tensor]:
    """``floor(N w)`` as whole numbers, and the fractions that are left, in [0, 1)."""
    expected = len(weights) * _normalised(weights)
    whole = (expected + _ROUNDING).floor()
    return whole.long(), (expected - whole).clamp_min(0)


def _comb(weights: Tensor, offsets: Tensor) -> Tensor:
    """Ancestors at ``(n + offset) / N``."""
    return _invert(_normalised(weights), (torch.arange(len(weights), dtype=torch.float64) + offsets) / len(weights))


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """The inverse of the weights' distribution function at ``points`` in [0, 1]."""
    cumulative = weights.cumsum(0)
    # right=True steps over particles of weight zero, whose interval is empty; so does staying below 1 at the end.
    return torch.searchsorted(cumulative / cumulative[-1], points.clamp_max(_LAST), right=True)
