"""The cells of a table: files that runs and processes share, each whole or not there."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArtefactError, StitchError
from ..files import make_folder, read_json, write_text

Report = dict[str, Any]


def read_cell(path: Path) -> dict[str, Any] | None:
    """A cell, or None where it is missing or damaged."""
    try:
        return read_json(path)
    except ArtefactError:
        return None


def attempt(do: Callable[[], object], note: Path) -> str | None:
    """``do`` a cell: what went wrong in one line, its traceback in the file ``note``, or None. Whatever it is, the
    other cells are not to be lost."""
    try:
        make_folder(note.parent)
        do()
    except Exception as error:
        write_text(note, traceback.format_exc())
        return str(error) if isinstance(error, StitchError) else f"{type(error).__name__}: {error} (see {note})"
    note.unlink(missing_ok=True)
    return None


def publish(assemble: Callable[[], Report], write: Callable[[Report], object]) -> Report:
    """``write`` the report of the cells that are there, and again while any has come meanwhile.

    Of two processes that share a folder, the one that read the cells first may write its report last, over the other's
    that has more of them.
    """
    report = assemble()
    while True:
        write(report)
        if (now := assemble()) == report:
            return report
        report = now
