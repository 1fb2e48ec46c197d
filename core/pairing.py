"""Every registered pair, and what stands in the way of stitching it here: from records alone, free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from .errors import PluginConflictError, UnknownNameError
from .loading import missing_modules
from .records import BackboneRecord, RewardRecord
from .registries import Registry, Shelf

GITHUB_JOBS = 256
"""The most jobs that GitHub takes from one matrix."""


@attrs.frozen
class Pair:
    """A backbone and a reward by name; ``obstacles`` say why it cannot be stitched here, one sentence each, none where
    it can."""

    backbone: str
    reward: str
    obstacles: tuple[str, ...] = ()

    @property
    def stitchable(self) -> bool:
        return not self.obstacles


def registered_pairs(names: Registry) -> tuple[Pair, ...]:
    """Every registered backbone with every registered reward, by name; names that two sources claim are among them.

    Grids of any size, resolution and width can be joined, so that a pair lacks nothing but what one of the two lacks:
    its code, a package that the code imports, or its weights. Whether a hub holds the weights is not asked.
    """
    backbones = {name: _obstacles(names.backbones, name, names) for name in _all(names.backbones)}
    rewards = {name: _obstacles(names.rewards, name, names) for name in _all(names.rewards)}
    return tuple(
        Pair(backbone, reward, backbones[backbone] + rewards[reward]) for backbone in backbones for reward in rewards
    )


def github_matrix(names: Registry) -> dict[str, list[dict[str, str]]]:
    """What ``strategy.matrix`` of a GitHub workflow takes: one job a backbone, each against every reward.

    ``{"include": [{"backbones": "flux-dev"}, ...]}``; beyond :data:`GITHUB_JOBS` backbones share jobs, their names
    separated by commas. A pair that cannot be stitched is in it too, so that its job fails and says why.
    """
    backbones = list(dict.fromkeys(pair.backbone for pair in registered_pairs(names)))
    each = -(-len(backbones) // GITHUB_JOBS) or 1
    groups = (backbones[start : start + each] for start in range(0, len(backbones), each))
    return {"include": [{"backbones": ",".join(group)} for group in groups]}


def _all(shelf: Shelf[Any]) -> list[str]:
    return sorted({*shelf, *shelf.conflicts()})


def _obstacles(shelf: Shelf[Any], name: str, names: Registry) -> tuple[str, ...]:
    """Why one of the two cannot be stitched to anything."""
    try:
        record: BackboneRecord | RewardRecord = shelf[name]
    except PluginConflictError as error:
        return (str(error),)
    found = []
    try:
        family = names.family(record)
    except (UnknownNameError, PluginConflictError) as error:
        found.append(f"{name!r}: {str(error).splitlines()[0]}")
    else:
        if missing := missing_modules(family):
            install = family.install or " ".join(missing)
            found.append(f"{name!r} needs {', '.join(missing)}, which is not installed: pip install '{install}'.")
    if record.path is None and record.repo is None:
        found.append(f"{name!r} names no weights; give its record a 'repo' or 'path'.")
    elif record.path is not None and not Path(record.path).exists():
        found.append(f"{name!r}: its weights {record.path!r} do not exist.")
    return tuple(found)
