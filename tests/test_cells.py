"""The cells that runs and processes share: what fails is told, and no report stays behind another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitchvm.core.errors import ConfigError
from stitchvm.core.files import read_json, write_json
from stitchvm.core.reproduction.cells import attempt, publish, read_cell


def test_a_report_written_over_a_fuller_one_is_written_again(tmp_path):
    """Another process ends a cell and writes its table between this one's reading and its writing."""
    table, writes = tmp_path / "table.json", []
    write_json(tmp_path / "cell-0.json", {})

    def assemble() -> dict[str, object]:
        return {"cells": sorted(path.name for path in tmp_path.glob("cell-*.json"))}

    def write(report: dict[str, object]) -> None:
        if not writes:
            write_json(tmp_path / "cell-1.json", {})
            write_json(table, assemble())
        writes.append(report)
        write_json(table, report)

    found = publish(assemble, write)
    assert found == read_json(table) == {"cells": ["cell-0.json", "cell-1.json"]}
    assert len(writes) == 2


def test_what_fails_leaves_its_traceback_until_it_is_done(tmp_path):
    note = tmp_path / "cells" / "one.error.txt"

    def broken() -> None:
        raise ZeroDivisionError("by nothing")

    assert attempt(broken, note) == f"ZeroDivisionError: by nothing (see {note})"
    assert "in broken" in note.read_text()
    assert attempt(lambda: None, note) is None and not note.exists()


def test_a_mistake_is_told_in_its_own_words(tmp_path):
    def mistaken() -> None:
        raise ConfigError("steps is 0; give 1 or more.")

    assert attempt(mistaken, tmp_path / "one.error.txt") == "steps is 0; give 1 or more."


def test_an_interrupt_is_no_failure(tmp_path):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted, tmp_path / "one.error.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_cell_that_is_missing_or_damaged_is_none(tmp_path: Path, content: str | None):
    path = tmp_path / "cell.json"
    if content is not None:
        path.write_text(content)
    assert read_cell(path) is None
