"""A toy world, as a package would bring it, and what its tables are asked in tests."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import attrs
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stitchvm.core import align
from stitchvm.core.images import to_tensor
from stitchvm.core.reproduction.alignment_rows import Settings
from stitchvm.core.reproduction.alignment_tables import reproduce
from stitchvm.core.reproduction.worlds import Scale

DATASET = """
import torch
from stitchvm.core import Captioned, Rated

class Toy:
    def _images(self, split, count, seed):
        draw = torch.Generator().manual_seed(seed + (split == "test") * 100)
        return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)

    def captioned(self, split, count, seed=0):
        return Captioned(self._images(split, count, seed), self.prompts(split, count, seed))

    def prompts(self, split, count, seed=0):
        return [f"{split} {chr(97 + (n + seed) % 26)}" for n in range(count)]

    def rated(self, split, count, seed=0):
        return Rated(self._images(split, count, seed), torch.arange(float(count)))

    def fulfilled(self, images, prompts):
        assert len(images) == len(prompts)
        return images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))
"""
BACKBONE = """
[backbones.{name}]
family = "{family}"
path = "{name}"
resolution = 16
architecture = {architecture}
"""
REWARDS = """
[rewards.tiny-clip]
family = "clip"
path = "clip"
[rewards.tiny-aesthetic]
family = "aesthetic"
path = "clip"
architecture = {aesthetic}
[datasets.toy]
load = "toy_data:Toy"
"""
DINO = """
[rewards.tiny-dino]
family = "dinov2"
path = "dino"
"""
SCALE = Scale(images=8, steps=2, probes=8)
SMALL = Settings(prompts=3, steps=3, strengths_tweedie=(1, 5), strengths_stitched=(2,), particles=2)
OPTIONS = ("--prompts", 3, "--steps", 3, "--images", 8, "--finetune-steps", 2, "--probes", 8)


def redrawn(place: Path) -> None:
    """The weights of another training: every tensor a little different."""
    draw = torch.Generator().manual_seed(5)
    tensors = {name: t + 0.05 * torch.randn(t.shape, generator=draw) for name, t in load_file(place).items()}
    save_file(tensors, place, {"format": "pt"})


def small(table: str, out: Path, models: Path | None = None, **options: Any) -> dict[str, Any]:
    """``reproduce`` in miniature; with ``models`` what it had to stitch is kept there for other tests."""
    given = {"settings": SMALL, "scale": SCALE, "progress": False, "values": models, **options}
    report = reproduce(table, "toy", out, **given)
    if models is not None and (out / "models").exists():
        shutil.copytree(out / "models", models, dirs_exist_ok=True)
    return report


def changed(**changes: Any) -> Settings:
    return attrs.evolve(SMALL, **changes)


def by_row(report: dict[str, Any], **wanted: str) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in report["rows"] if all(row[key] == value for key, value in wanted.items())}


def alone(method: str, value: Any, backbone: str = "one", **settings: Any) -> Any:
    """The run behind a row, by itself."""
    options = {"reward": "tiny-clip", "steps": 3, "particles": 1, "progress": False, **settings}
    return align(method, backbone, value, ["test a", "test b", "test c"], **options)


def pictures(row: dict[str, Any], out: Path) -> torch.Tensor:
    files = [out / row["run"] / f"{number:04d}.png" for number in range(row["prompts"])]
    return torch.stack([to_tensor(Image.open(file)) for file in files])


def averaged(values: Any) -> dict[str, Any]:
    numbers = [float(value) for value in values]
    error = stdev(numbers) / math.sqrt(len(numbers))
    return {"mean": pytest.approx(mean(numbers), abs=1e-6), "stderr": pytest.approx(error, abs=1e-6)}
