"""Means with their standard errors, and gains paired by prompt and seed: what a steering result is reported as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from .datasets import Judge
from .errors import ArtefactError, ConfigError, DataError
from .files import read_json

if TYPE_CHECKING:
    from torch import Tensor

ALIGN_REPORT = "align.json"
"""What a folder that ``align`` wrote is recognised by."""


@attrs.frozen
class MeanStderr:
    """A mean and its standard error: the sample standard deviation over ``sqrt(n)``, None from a single value."""

    mean: float
    stderr: float | None

    def report(self) -> dict[str, float | None]:
        """JSON-able: ``mean`` and ``stderr``."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.stderr is None else f"{self.mean:.4g} ± {self.stderr:.2g}"


def mean_stderr(values: Iterable[float] | Tensor) -> MeanStderr:
    """Mean and standard error of independent ``values`` (a list or a tensor ``[n]``, booleans count as 0 and 1).

    Raises :class:`DataError` when there is none, or one that is not finite.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise DataError("there is no value to average.")
    if not all(map(math.isfinite, numbers)):
        raise DataError("a value to average is not finite.")
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1:
        return MeanStderr(mean, None)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    return MeanStderr(mean, math.sqrt(variance / len(numbers)))


def paired_gain(values: Iterable[float] | Tensor, base: Iterable[float] | Tensor) -> MeanStderr:
    """Mean and standard error of ``values - base``, entry by entry: the same prompt and seed stand in the same place.

    What prompts have in common cancels, so the error is that of the difference and not of either mean.
    Raises :class:`DataError` when the two differ in number.
    """
    pairs = [float(value) for value in values], [float(value) for value in base]
    if len(pairs[0]) != len(pairs[1]):
        counts = f"{len(pairs[0])} values with {len(pairs[1])}"
        raise DataError(f"cannot pair {counts}; run both on the same prompts and seeds.")
    return mean_stderr(value - other for value, other in zip(*pairs, strict=True))


def compare_runs(folders: Sequence[str | Path], fulfilled: Judge | None = None) -> dict[str, Any]:
    """Folders that ``align`` wrote, side by side, every gain paired with the first folder; JSON-able.

    Each run has ``reward`` and (given a detector, else None) ``detector`` as ``{mean, stderr}``, ``cost``, and all but
    the first ``gain`` and ``detector_gain``. Raises ``ArtefactError`` for a folder without a whole run and
    :class:`ConfigError` for runs of different prompts, seeds or rewards, which have no pairs.
    """
    runs = [_Run.read(Path(folder)) for folder in folders]
    if not runs:
        raise ConfigError("there is no folder to compare; give at least one that align wrote.")
    base = runs[0]
    for run in runs[1:]:
        run.check_pairs(base)
    shown = [None if fulfilled is None else fulfilled(run.images(), list(run.prompts)).float() for run in runs]
    entries = []
    for run, detected in zip(runs, shown, strict=True):
        entry = {**run.label, "reward": mean_stderr(run.rewards).report(), "cost": run.cost,
                 "detector": None if detected is None else mean_stderr(detected).report()}  # fmt: skip
        if run is not base:
            entry["gain"] = paired_gain(run.rewards, base.rewards).report()
            if detected is not None and shown[0] is not None:
                entry["detector_gain"] = paired_gain(detected, shown[0]).report()
        entries.append(entry)
    return {"prompts": len(base.prompts), "seed": base.seed, "runs": entries}


@attrs.frozen
class _Run:
    """What a comparison needs of one ``align`` folder."""

    folder: Path
    prompts: tuple[str, ...]
    files: tuple[str, ...]
    rewards: tuple[float, ...]
    seed: int
    reward: str
    label: dict[str, Any]
    cost: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> _Run:
        content = read_json(folder / ALIGN_REPORT)
        try:
            settings, samples = content["settings"], content["samples"]
            return cls(
                folder, tuple(s["prompt"] for s in samples), tuple(s["file"] for s in samples),
                tuple(float(s["reward"]) for s in samples), int(content["seed"]), str(settings["reward"]["name"]),
                {"folder": str(folder), "method": settings["method"], "particles": settings["particles"]},
                dict(content["cost"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            place = str(folder / ALIGN_REPORT)
            raise ArtefactError(f"{place!r} is not what align writes ({error!r}). Run it again.") from error

    def check_pairs(self, base: _Run) -> None:
        for what in ("prompts", "seed", "reward"):
            if getattr(self, what) != getattr(base, what):
                raise ConfigError(
                    f"{str(self.folder)!r} and {str(base.folder)!r} differ in their {what}, so their samples are no "
                    f"pairs. Run both with the same {what}."
                )

    def images(self) -> Tensor:
        """``[N, 3, H, W]`` float32 in [0, 1], in the order of the prompts."""
        import torch
        from PIL import Image

        from .images import to_tensor

        images = []
        for name in self.files:
            try:
                with Image.open(self.folder / name) as image:
                    images.append(to_tensor(image))
            except (OSError, SyntaxError) as error:
                place = str(self.folder / name)
                raise ArtefactError(f"{place!r} cannot be read ({error}). Run align again.") from error
        return torch.stack(images)
