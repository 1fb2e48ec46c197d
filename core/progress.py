"""Progress bars, off when the caller says so or nobody is watching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """``items`` with a bar on standard error that leaves its final state behind."""
    return iter(tqdm(items, desc=label, total=total, disable=not show, dynamic_ncols=True, mininterval=0.5))
