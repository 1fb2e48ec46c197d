"""The training scenes, drawn once and kept in the work folder."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

from ..render import SIZE, make_split
from ..scenes import Split
from .loop import write_atomically

#: Scenes are drawn in shards of this many, each from its own seed.
SHARD = 2000


@attrs.frozen
class Pictures:
    """Images uint8 [N, 3, 64, 64] and their captions."""

    images: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def _shard(seed: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[str]]:
    images, captions, _ = make_split("train", SHARD, seed)
    return images.numpy(), captions


@functools.cache
def training_set(work: Path, count: int = 60_000, seed: int = 1) -> Pictures:
    """`count` training scenes, rounded up to whole shards; drawn on the first call, read from `work` afterwards."""
    shards = -(-count // SHARD)
    stem = work / f"scenes-{shards * SHARD}-{seed}"
    images_path, captions_path = stem.with_suffix(".npy"), stem.with_suffix(".txt")
    if not (images_path.exists() and captions_path.exists()):
        images = np.empty((shards * SHARD, 3, SIZE, SIZE), np.uint8)
        captions: list[str] = []
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            for k, (part, texts) in enumerate(pool.map(_shard, range(seed * 10_000, seed * 10_000 + shards))):
                images[k * SHARD : (k + 1) * SHARD] = part
                captions += texts
        write_atomically(images_path, lambda path: _save_array(path, images))
        write_atomically(captions_path, lambda path: path.write_text("\n".join(captions)))
    return Pictures(torch.from_numpy(np.load(images_path)), captions_path.read_text().split("\n"))


def _save_array(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    with path.open("wb") as file:
        np.save(file, array)


@functools.cache
def held_out(count: int = 1000, seed: int = 7, split: Split = "test") -> Pictures:
    """`count` held-out scenes with different captions."""
    images, captions, _ = make_split(split, count, seed)
    return Pictures(images, captions)


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0 .. 1."""
    return images.float() / 255
