"""What a run cost: forward passes by kind, wall time and peak memory.

A network counts itself (``count("denoiser", batch)``) and every open :class:`CostMeter` of the thread sees it, so no
code between the two has to pass a counter along.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Self

import attrs

FORWARD = ("denoiser", "resumed", "decoder", "encoder", "reward", "head", "tail")
"""The kinds of forward pass; one unit is one sample through one network (CFG is two denoiser passes a sample).

``resumed`` is a denoiser pass whose first blocks a value model's head had run already."""

BACKWARD = tuple(f"{kind}_backward" for kind in ("denoiser", "decoder", "reward", "head"))
"""The kinds of backward pass, counted while :func:`differentiating`; a tail's belongs to its head's."""

KINDS = (*FORWARD, *BACKWARD)

_open_meters: ContextVar[tuple[CostMeter, ...]] = ContextVar("open_meters", default=())
_differentiating: ContextVar[bool] = ContextVar("differentiating", default=False)


def count(kind: str, samples: int) -> None:
    """Add ``samples`` forward passes of ``kind`` to every open meter, and their backward passes where there will be."""
    if kind not in FORWARD:
        raise ValueError(f"unknown kind of forward pass {kind!r}; choose one of {', '.join(FORWARD)}.")
    backward = f"{kind}_backward" if _differentiating.get() and f"{kind}_backward" in BACKWARD else None
    if backward is not None and not sys.modules["torch"].is_grad_enabled():
        backward = None
    for meter in _open_meters.get():
        meter.passes[kind] += samples
        if backward is not None:
            meter.passes[backward] += samples


@contextmanager
def differentiating() -> Iterator[None]:
    """Inside, what is run with gradients enabled is taken to be differentiated afterwards."""
    token = _differentiating.set(True)
    try:
        yield
    finally:
        _differentiating.reset(token)


def peak_memory() -> int:
    """Peak memory in bytes: of the device where CUDA runs, else of the process since it started."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@attrs.define(eq=False)
class CostMeter:
    """``with CostMeter() as cost: ...`` counts what happens inside; meters nest."""

    passes: Counter[str] = attrs.field(factory=Counter)
    seconds: float = 0.0
    _started: float = attrs.field(default=0.0, init=False)
    _token: object = attrs.field(default=None, init=False)

    def __enter__(self) -> Self:
        self._token = _open_meters.set((*_open_meters.get(), self))
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
        _open_meters.reset(self._token)  # type: ignore[arg-type]

    def add(self, other: CostMeter) -> None:
        """Count what ``other`` counted too."""
        self.passes.update(other.passes)
        self.seconds += other.seconds

    def report(self) -> dict[str, float]:
        """JSON-able: passes by kind (only kinds that ran), ``seconds``, ``peak_memory`` in bytes."""
        return {
            **{k: self.passes[k] for k in KINDS if self.passes[k]},
            "seconds": round(self.seconds, 3),
            "peak_memory": peak_memory(),
        }


class Clock:
    """Wall time of named steps."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._steps: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._steps[step] = round(time.perf_counter() - started, 1)

    def report(self) -> dict[str, float]:
        """JSON-able: seconds by step, and ``total`` since the clock was made."""
        return {**self._steps, "total": round(time.perf_counter() - self._started, 1)}
