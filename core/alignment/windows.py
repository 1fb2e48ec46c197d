"""Which steps of a schedule something happens at: given as fractions of the steps, as indices or as noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..errors import ConfigError

Window = tuple[float, float]
StepUnit = Literal["fraction", "step", "sigma"]


def steps_within(sigmas: Tensor, window: Window, unit: StepUnit = "fraction", *, include_end: bool = True) -> list[int]:
    """The steps of ``sigmas [steps + 1]`` (falling to 0) inside ``window``, both ends included; without
    ``include_end``, the end that is reached last is left out, which is the lower one of two levels.

    ``fraction`` of the steps (0.2 to 0.8 of 40: steps 8 to 32), ``step`` numbers from 0, or ``sigma`` levels that the
    step begins at. Raises :class:`ConfigError` for ends out of order, out of range, or beyond the last step.
    """
    steps = len(sigmas) - 1
    _check_inside((window[0],), steps, unit)
    _check_inside((window[1],), steps + (not include_end), unit)
    if window[0] > window[1]:
        raise ConfigError(f"window is {window[0]:g} to {window[1]:g}; give two rising {unit}s.")
    scale = steps if unit == "fraction" else 1
    low, high = (round(end * scale, 6) for end in window)
    places = sigmas[:-1].tolist() if unit == "sigma" else range(steps)
    inside = [step for step, place in enumerate(places) if low <= round(place, 6) <= high]
    last = low if unit == "sigma" else high
    return [step for step in inside if include_end or round(places[step], 6) != last]


def steps_at(sigmas: Tensor, places: Sequence[float], unit: StepUnit = "fraction") -> list[int]:
    """The steps nearest to ``places``, in order and each once; raises :class:`ConfigError` for one out of range."""
    steps = len(sigmas) - 1
    _check_inside(places, steps, unit)
    if unit == "sigma":
        return sorted({int((sigmas[:-1] - place).abs().argmin()) for place in places})
    scale = steps if unit == "fraction" else 1
    return sorted({min(round(place * scale), steps - 1) for place in places})


def _check_inside(places: Sequence[float], steps: int, unit: StepUnit) -> None:
    limit = steps - 1 if unit == "step" else 1
    if outside := [place for place in places if not 0 <= place <= limit]:
        raise ConfigError(f"there is no step at {unit} {outside[0]:g} of {steps} steps; give 0 to {limit}.")
