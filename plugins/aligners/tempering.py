"""Tempering: how much of a value's strength counts early on (DAS, Kim et al. 2025)."""

from __future__ import annotations


def tempered(rate: float | None, step: int) -> float:
    """``min((1 + rate)^step - 1, 1)`` at ``step`` (from 0); 1 without a rate. 0.008 for 100 steps, as published."""
    return 1.0 if rate is None else min((1 + rate) ** step - 1, 1.0)
