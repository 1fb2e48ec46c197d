"""Parts of a long measurement, kept as they are read, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs
from torch import Tensor

from ..costs import CostMeter
from ..errors import ArtefactError
from ..files import read_metadata, read_tensors, write_tensors

COSTS = "costs"


@attrs.frozen(eq=False)
class Reading:
    """What one part gave: ``tensors`` on the CPU and ``costs``, both by name."""

    tensors: dict[str, Tensor]
    costs: dict[str, CostMeter]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        costs = {name: [dict(meter.passes), meter.seconds] for name, meter in self.costs.items()}
        write_tensors(path, self.tensors, {COSTS: json.dumps(costs)})

    @classmethod
    def load(cls, path: Path) -> Reading:
        """What :meth:`save` wrote; raises ``ArtefactError`` when it is missing or damaged."""
        tensors = read_tensors(path)
        costs = json.loads(read_metadata(path)[COSTS])
        return cls(tensors, {name: CostMeter(Counter(passes), seconds) for name, (passes, seconds) in costs.items()})


def kept(folder: Path | None, name: str, read: Callable[[], Reading]) -> Reading:
    """What an earlier run left in ``folder`` under ``name``, or what ``read`` gives, which is left there.

    Nothing is left without a folder, nor of what is not finite: whoever corrects that has it read again.
    """
    if folder is None:
        return read()
    path = folder / f"{name}.safetensors"
    try:
        return Reading.load(path)
    except ArtefactError:
        found = read()
        if all(bool(tensor.isfinite().all()) for tensor in found.tensors.values()):
            found.save(path)
        return found


def total_costs(readings: Iterable[Reading]) -> dict[str, CostMeter]:
    """What all parts cost together, by name."""
    totals: dict[str, CostMeter] = {}
    for reading in readings:
        for name, meter in reading.costs.items():
            totals.setdefault(name, CostMeter()).add(meter)
    return totals
