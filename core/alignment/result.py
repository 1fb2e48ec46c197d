"""What :func:`~stitchvm.core.align` returns, and the parts of it that a long run keeps on disk as prompts finish."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..comparison import mean_stderr
from ..costs import KINDS, CostMeter, peak_memory
from ..errors import ArtefactError, ConfigError
from ..files import make_folder, read_json, read_tensors, write_atomically, write_json, write_tensors
from ..provenance import versions
from .particles import Particles, Resampling

PARTS, SETTINGS = "parts", "settings.json"
GRID_IMAGES, GRID_SIDE = 64, 256
"""``grid.png`` shows this many images at most, each at most this many pixels wide."""


@attrs.frozen(eq=False)
class AlignResult:
    """The best particle of every prompt, and all particles.

    ``pixels [P, 3, H, W]`` uint8, as in the PNG files; ``particles`` without images; ``settings`` all that decided the
    result; ``cost`` forward passes by kind, ``seconds`` (over all sessions of a continued run) and ``peak_memory`` in
    bytes.
    """

    prompts: tuple[str, ...]
    pixels: Tensor
    particles: Particles
    settings: dict[str, Any]
    cost: dict[str, float]
    versions: dict[str, str] = attrs.field(factory=versions)

    @property
    def images(self) -> Tensor:
        """``[P, 3, H, W]`` float32 in [0, 1], in 256 levels."""
        return self.pixels.float() / 255

    @property
    def rewards(self) -> Tensor:
        """``[P]``: the clean reward of each prompt's best particle."""
        return self.particles.rewards.gather(1, self.particles.best[:, None]).squeeze(1)

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    def report(self) -> dict[str, Any]:
        """JSON-able: settings, versions, cost, mean reward, one entry a prompt; None for a reward that is no number."""
        found, dropped = self.particles, self.particles.dropped
        entries = [
            {"prompt": prompt, "file": _file(number), "reward": float(self.rewards[number]),
             "best": int(found.best[number]),
             "particle_rewards": [None if math.isnan(one) else one for one in found.rewards[number].tolist()],
             "weights": found.weights[number].tolist(), "ancestry": found.ancestry[number].tolist(),
             "ess": [float(look.ess[number]) for look in found.history], "dropped": int(dropped[number])}
            for number, prompt in enumerate(self.prompts)
        ]  # fmt: skip
        looks = [{"step": look.step, "sigma": look.sigma} for look in found.history]
        return {
            "settings": self.settings, "seed": self.seed, "versions": self.versions, "cost": self.cost,
            "reward": mean_stderr(self.rewards.tolist()).report(), "resampling": looks, "samples": entries,
        }  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write one PNG a prompt, ``grid.png`` and ``align.json``; raises ``OutputError`` when that is impossible."""
        folder = make_folder(folder)
        for number, image in enumerate(self.pixels):
            write_png(folder / _file(number), image)
        write_png(folder / "grid.png", sheet(self.pixels[:GRID_IMAGES]))
        write_json(folder / "align.json", self.report())


def _file(number: int) -> str:
    return f"{number:04d}.png"


def write_png(path: Path, pixels: Tensor) -> None:
    """Write pixels ``[3, H, W]`` uint8 atomically."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def sheet(pixels: Tensor, gap: int = 2) -> Tensor:
    """Images ``[n, 3, H, W]`` side by side on white, as nearly square as it goes."""
    if (longest := max(pixels.shape[-2:])) > GRID_SIDE:
        size = [max(1, round(side * GRID_SIDE / longest)) for side in pixels.shape[-2:]]
        small = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
        pixels = small.round().byte()
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    padded = F.pad(pixels, (0, gap, 0, gap), value=255)
    whole = F.pad(padded, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(pixels)), value=255)
    whole = whole.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return whole[:, : whole.shape[1] - gap, : whole.shape[2] - gap]


@attrs.define(eq=False)
class PartStore:
    """Finished prompts, in memory and, when there is a ``folder``, each in a file of its own as soon as it is done."""

    settings: dict[str, Any]
    folder: Path | None = None
    parts: dict[int, dict[str, Tensor]] = attrs.field(factory=dict)

    @classmethod
    def open(cls, out: str | Path | None, settings: dict[str, Any]) -> Self:
        """What an earlier run with the same settings left in ``out``.

        Raises :class:`ConfigError` when that run had other settings, naming them; a damaged part is run again.
        """
        if out is None:
            return cls(settings)
        folder = make_folder(Path(out) / PARTS)
        if (folder / SETTINGS).exists():
            check_same(read_json(folder / SETTINGS), settings, Path(out))
        else:
            write_json(folder / SETTINGS, settings)
        store = cls(settings, folder)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                store.parts[int(path.stem)] = read_tensors(path)
            except (ArtefactError, ValueError):
                path.unlink()
        return store

    def __contains__(self, number: int) -> bool:
        return number in self.parts

    def add(self, numbers: Sequence[int], particles: Particles, cost: CostMeter) -> None:
        """Keep the particles of these prompts; every prompt of a batch has the same share of its cost."""
        share = torch.tensor([*(cost.passes[kind] for kind in KINDS), cost.seconds], dtype=torch.float64) / len(numbers)
        for row, number in enumerate(numbers):
            part = {**_tensors(particles, row), "cost": share}
            self.parts[number] = part
            if self.folder is not None:
                write_tensors(self.folder / f"{number:04d}.safetensors", part)

    def result(self, prompts: tuple[str, ...]) -> AlignResult:
        """All prompts' parts together."""
        parts = [self.parts[number] for number in range(len(prompts))]
        joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        total = joined.pop("cost").sum(0).tolist()
        passes = Counter(dict(zip(KINDS, map(round, total[:-1]), strict=True)))
        cost = {**{kind: passes[kind] for kind in KINDS if passes[kind]}, "seconds": round(total[-1], 3)}
        return AlignResult(
            prompts, joined.pop("pixels"), _particles(joined), self.settings, {**cost, "peak_memory": peak_memory()}
        )


def check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """Raise :class:`ConfigError`, naming what differs, unless a run to be continued has the settings of the new one."""
    before, now = _leaves(old), _leaves(new)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changed = [f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names]
    if changed:
        raise ConfigError(
            f"{str(out)!r} holds a run with other settings ({'; '.join(changed)}). "
            "Choose another folder, or delete that one to start again."
        )


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, under dotted names."""
    found: dict[str, Any] = {}
    for name, entry in table.items():
        found |= _leaves(entry, f"{prefix}{name}.") if isinstance(entry, dict) else {prefix + name: entry}
    return found


def _tensors(particles: Particles, prompt: int) -> dict[str, Tensor]:
    """One prompt's particles, and the pixels of its best, as named tensors without a prompt dimension."""
    assert particles.images is not None
    best = particles.images[prompt, particles.best[prompt]]
    history = particles.history
    found = {
        "pixels": (best.clamp(0, 1) * 255).round().byte(),
        "latents": particles.latents[prompt], "log_weights": particles.log_weights[prompt],
        "rewards": particles.rewards[prompt], "ancestry": particles.ancestry[prompt],
    }  # fmt: skip
    if history:
        found["history.step"] = torch.tensor([look.step for look in history])
        found["history.sigma"] = torch.tensor([look.sigma for look in history], dtype=torch.float64)
        for name in ("values", "ess", "resampled", "ancestors"):
            found[f"history.{name}"] = torch.stack([getattr(look, name)[prompt] for look in history])
    return found


def _particles(joined: dict[str, Tensor]) -> Particles:
    """The inverse of :func:`_tensors` for stacked prompts, without the images."""
    looks: list[Resampling] = []
    if "history.step" in joined:
        for event, (step, sigma) in enumerate(
            zip(joined["history.step"][0].tolist(), joined["history.sigma"][0].tolist(), strict=True)
        ):
            rest = {name: joined[f"history.{name}"][:, event] for name in ("values", "ess", "resampled", "ancestors")}
            looks.append(Resampling(step, sigma, **rest))
    fields = {name: joined[name] for name in ("latents", "log_weights", "rewards", "ancestry")}
    return Particles(**fields, history=tuple(looks))
