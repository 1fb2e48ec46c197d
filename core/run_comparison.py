"""Folders that ``align`` wrote, side by side, and what repetitions with other seeds say together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from .comparison import clustered_mean, mean_stderr, paired_gain
from .datasets import Judge
from .errors import ArtefactError, ConfigError
from .files import read_json

if TYPE_CHECKING:
    from torch import Tensor

ALIGN_REPORT = "align.json"
"""What a folder that ``align`` wrote is recognised by."""


def compare_runs(folders: Sequence[str | Path], fulfilled: Judge | None = None) -> dict[str, Any]:
    """Folders that ``align`` wrote, side by side, every gain paired with the first folder; JSON-able.

    Each run has ``reward`` and (given a detector, else None) ``detector`` as ``{mean, stderr}``, ``cost``, and all but
    the first ``gain`` and ``detector_gain``. Raises ``ArtefactError`` for a folder without a whole run and
    :class:`ConfigError` for runs of different prompts, seeds or rewards, which have no pairs.
    """
    return _Group.read(folders).judged(fulfilled).report()


def compare_repetitions(
    folders: Sequence[str | Path], repetitions: int, fulfilled: Judge | None = None
) -> dict[str, Any]:
    """The same comparison made ``repetitions`` times with other seeds or prompts, and all of it together; JSON-able.

    ``folders`` are those of the first repetition, then of the second, each in the same order. ``repetitions`` holds
    what :func:`compare_runs` says of each, ``pooled`` the gains of every run but the first over all pairs, whose
    standard errors are clustered by prompt (:func:`~stitchvm.core.comparison.clustered_mean`), as the repetitions of
    one prompt are not independent. Raises as :func:`compare_runs`, and :class:`ConfigError` where the folders
    cannot be divided, differ in more than seed and prompts, or are repeated as they are.
    """
    if repetitions < 2 or len(folders) < 2 * repetitions or len(folders) % repetitions:
        raise ConfigError(
            f"{len(folders)} folders are no {repetitions} repetitions of one comparison; give those of the first, base "
            "first, then as many of every other one in the same order."
        )
    size = len(folders) // repetitions
    groups = [_Group.read(folders[start : start + size]) for start in range(0, len(folders), size)]
    for group in groups[1:]:
        for run, first in zip(group.runs, groups[0].runs, strict=True):
            run.check_repeats(first)
    if len({(group.base.seed, group.base.prompts) for group in groups}) < len(groups):
        raise ConfigError("two repetitions have the same prompts and seed, so they say nothing new; leave one out.")
    groups = [group.judged(fulfilled) for group in groups]
    return {
        "repetitions": [group.report() for group in groups],
        "pooled": [_pooled(groups, place) for place in range(1, size)],
    }


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
    settings: dict[str, Any]
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
                dict(settings), dict(content["cost"]),
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

    def check_repeats(self, first: _Run) -> None:
        mine, theirs = _unseeded(self.settings), _unseeded(first.settings)
        changed = [name for name in sorted({*mine, *theirs} - {"prompts"}) if mine.get(name) != theirs.get(name)]
        if changed:
            raise ConfigError(
                f"{str(self.folder)!r} is no repetition of {str(first.folder)!r}: they differ in their "
                f"{', '.join(changed)}. Runs that are pooled may differ in seed and prompts alone."
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


def _unseeded(settings: Any) -> Any:
    """Without the seed, which estimators that draw have as well."""
    if isinstance(settings, dict):
        return {name: _unseeded(value) for name, value in settings.items() if name != "seed"}
    return [_unseeded(value) for value in settings] if isinstance(settings, list) else settings


@attrs.frozen
class _Group:
    """Runs of the same prompts and seed, the base first; ``detected`` what a detector says of each one's pictures."""

    runs: tuple[_Run, ...]
    detected: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def read(cls, folders: Sequence[str | Path]) -> _Group:
        runs = tuple(_Run.read(Path(folder)) for folder in folders)
        if not runs:
            raise ConfigError("there is no folder to compare; give at least one that align wrote.")
        for run in runs[1:]:
            run.check_pairs(runs[0])
        return cls(runs)

    def judged(self, fulfilled: Judge | None) -> _Group:
        """With what a detector, if any, says of every picture; slow, so what can be refused is refused before."""
        if fulfilled is None:
            return self
        detected = (fulfilled(run.images(), list(run.prompts)).float().tolist() for run in self.runs)
        return attrs.evolve(self, detected=tuple(map(tuple, detected)))

    @property
    def base(self) -> _Run:
        return self.runs[0]

    def figures(self, place: int) -> dict[str, tuple[float, ...]]:
        """``reward`` and, given a detector, ``detector`` of the run at ``place``, prompt by prompt."""
        return {
            "reward": self.runs[place].rewards, **({} if self.detected is None else {"detector": self.detected[place]})
        }  # fmt: skip

    def report(self) -> dict[str, Any]:
        entries = []
        for place, run in enumerate(self.runs):
            found, base = self.figures(place), self.figures(0)
            means = {name: mean_stderr(values).report() for name, values in found.items()}
            entry = {**run.label, "detector": None, **means, "cost": run.cost}
            if place > 0:
                entry |= {_GAIN[name]: paired_gain(found[name], base[name]).report() for name in found}
            entries.append(entry)
        return {"prompts": len(self.base.prompts), "seed": self.base.seed, "runs": entries}


_GAIN = {"reward": "gain", "detector": "detector_gain"}


def _pooled(groups: Sequence[_Group], place: int) -> dict[str, Any]:
    """Gains of the run at ``place`` over all repetitions."""
    prompts = [prompt for group in groups for prompt in group.base.prompts]
    gains = {}
    for name in groups[0].figures(place):
        differences = [
            value - other
            for group in groups
            for value, other in zip(group.figures(place)[name], group.figures(0)[name], strict=True)
        ]
        gains[_GAIN[name]] = clustered_mean(differences, prompts).report()
    return {**groups[0].runs[place].label, "pairs": len(prompts), "prompts": len(set(prompts)), **gains}
