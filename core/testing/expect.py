"""How a check says what it expected and what it found instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import StitchError

CLOSE = 1e-4
"""Largest difference, relative to the larger of 1 and the expected tensor's largest entry, of passes that may round
differently."""


class Mismatch(Exception):
    """One check's finding; :func:`~stitchvm.core.testing.run_check` adds whose it is."""


def expect(holds: bool, expected: str, found: object, hint: str = "") -> None:
    """Raise :class:`Mismatch` unless ``holds``. ``hint``: the mistake that usually causes it."""
    if not holds:
        raise Mismatch(f"expected {expected}, found {found}." + (f" {hint}" if hint else ""))


def expect_equal(ours: Tensor, theirs: Tensor, what: str, hint: str = "") -> None:
    """Equal bit for bit."""
    expect_shape(ours, tuple(theirs.shape), what)
    expect(torch.equal(ours, theirs), f"{what}, bit for bit", f"a difference of {_difference(ours, theirs):.3g}", hint)


def expect_close(ours: Tensor, theirs: Tensor, what: str, hint: str = "", tolerance: float = CLOSE) -> None:
    """Equal up to rounding."""
    expect_shape(ours, tuple(theirs.shape), what)
    largest = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    difference = _difference(ours, theirs)
    expect(difference <= tolerance * largest, f"{what} within {tolerance:g}", f"a difference of {difference:.3g}", hint)


def expect_shape(tensor: Any, shape: tuple[int, ...], what: str, hint: str = "") -> None:
    """A tensor of exactly this shape."""
    found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    expect(found == list(shape), f"{what} of shape {list(shape)}", found, hint)


def expect_finite(tensor: Tensor, what: str, hint: str = "") -> None:
    """No infinity and no NaN."""
    expect(bool(tensor.isfinite().all()), f"{what} to be finite", "infinities or NaN", hint)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if not ours.numel():
        return 0.0
    difference = (ours.double() - theirs.double()).abs().max()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def refuses(call: Callable[[], object], error: type[StitchError], what: str, hint: str = "") -> str:
    """The message of the ``error`` that ``call`` must raise."""
    try:
        call()
    except error as raised:
        return str(raised)
    except Exception as raised:
        message = f"{type(raised).__name__}: {raised}"
        raise Mismatch(f"expected a {error.__name__} for {what}, found {message}. {hint}".rstrip()) from raised
    raise Mismatch(f"expected a {error.__name__} for {what}, found none. {hint}".rstrip())


@contextmanager
def global_randomness_kept(what: str) -> Iterator[None]:
    """The process's random state (torch's, on the CPU) is left as it was."""
    before = torch.random.get_rng_state()
    yield
    expect(
        torch.equal(before, torch.random.get_rng_state()),
        f"{what} to leave torch's global random state alone",
        "that it changed",
        "Draw from a generator of your own.",
    )
