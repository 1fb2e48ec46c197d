"""Prompt sources: a registered dataset by name, or a text file."""

from __future__ import annotations

from pathlib import Path

from .datasets import Judge, judges_of
from .errors import DataError
from .loading import load_dataset_plugin
from .registries import registry


def open_prompts(source: str | Path, count: int | None = None, *, split: str = "train", seed: int = 0) -> list[str]:
    """Prompts from a dataset that a plugin offers (``count`` different ones of a split), or from a file, one a line.

    Empty lines are left out and ``count`` takes the first ones of a file. Raises :class:`DataError` for a missing or
    empty file, for a dataset without a ``count`` and for a count below 1, and ``UnknownNameError`` for a dataset that
    must be installed.
    """
    if count is not None and count < 1:
        raise DataError(f"count of prompts is {count}; give a whole number from 1 on.")
    if isinstance(source, str) and (source in registry().datasets or ("dataset", source) in registry().hints):
        if count is None:
            raise DataError(f"dataset {source!r} can make any number of prompts; say how many.")
        return list(load_dataset_plugin(source)().prompts(split, count, seed))
    path = Path(source).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        known = ", ".join(registry().datasets) or "none"
        raise DataError(f"{str(path)!r} is neither a file of prompts nor a dataset; datasets: {known}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts cannot be read from {str(path)!r}: {error}. Give a text file, one a line.") from error
    prompts = [line.strip() for line in lines if line.strip()][:count]
    if not prompts:
        raise DataError(f"{str(path)!r} holds no prompt; write one a line.")
    return prompts


def judges_of_prompts(source: str | Path) -> dict[str, Judge]:
    """What judges pictures of a source's prompts beside any reward: a dataset's detector, none of a text file."""
    if isinstance(source, str) and source in registry().datasets:
        return judges_of(load_dataset_plugin(source)())
    return {}
