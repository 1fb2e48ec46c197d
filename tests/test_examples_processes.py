"""A cache of examples made by several processes is the one that a single process makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from analytic import GaussianBackbone, LinearReward
from stitchvm.core.images import open_images
from stitchvm.core.stitching.examples import CleanBatch, Examples, build_examples, from_images
from test_finetune import gaussian_images
from test_training_processes import start_two

COUNT = 700
"""Three shards, the last not full."""


def made(folder: Path, count: int | None = COUNT) -> tuple[Examples, list[int]]:
    """The cache, and from which examples on its source was read; several processes leave that in files."""
    starts: list[int] = []

    def latents(start: int) -> Iterator[CleanBatch]:
        starts.append(start)
        yield from from_images(GaussianBackbone(), open_images(gaussian_images(COUNT)), count, 2, 64)(start)

    found = build_examples(folder / "cache", latents, {"r": LinearReward()}, {}, count, label="x", progress=False)
    if rank := os.environ.get("RANK"):
        (folder / f"starts-{rank}").write_text(repr(starts))
    return found, starts


def share(folder: Path) -> None:
    made(folder)


def assert_same(one: Examples, other: Examples) -> None:
    assert len(one) == len(other) == COUNT
    rows = list(range(COUNT))
    expected, found = one.read(rows), other.read(rows)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_processes_make_what_one_makes_each_its_own_share(tmp_path: Path) -> None:
    whole, _ = made(tmp_path / "one")
    assert start_two(share, tmp_path).wait() == 0
    both, starts = made(tmp_path)
    assert_same(both, whole)
    assert starts == [] and [(tmp_path / f"starts-{rank}").read_text() for rank in (0, 1)] == ["[0]", "[256]"]


def test_what_one_process_lacks_is_made_and_nothing_else(tmp_path: Path) -> None:
    whole, _ = made(tmp_path / "whole")
    made(tmp_path / "cut")
    for name in ("done.json", "00001.safetensors"):
        (tmp_path / "cut" / "cache" / name).unlink()
    cut, starts = made(tmp_path / "cut")
    assert starts == [256]
    assert_same(cut, whole)


def test_a_source_of_unknown_length_is_counted_to_its_end(tmp_path: Path) -> None:
    whole, _ = made(tmp_path / "whole")
    unknown, _ = made(tmp_path / "unknown", None)
    assert_same(unknown, whole)
    (tmp_path / "unknown" / "cache" / "done.json").unlink()  # killed after its last shard
    again, starts = made(tmp_path / "unknown", None)
    assert starts == [768] and len(again) == COUNT
