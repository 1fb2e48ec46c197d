"""A small trained *world*: a dataset, and the backbones and rewards that came with it in one distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from ..errors import ConfigError
from ..records import Record
from ..registries import registry

positive: Any = attrs.validators.gt(0)

PAIRS = 3
"""Held-out pairs for every held-out image: an answer about a pair is one bit, and 1,000 of them leave a standard error
of 1.4 points."""


def cell_name(backbone: str, reward: str) -> str:
    """What a pair's files and folders are called."""
    return f"{backbone}--{reward}"


@attrs.frozen
class Scale:
    """How much of everything a cell takes; the defaults are for a small world on two cores.

    ``images`` and ``samples`` (where the recipe takes generated ones) feed the ``steps`` of stage 2, ``probes`` the
    search, ``held_out`` images the metric, or :data:`PAIRS` times as many pairs.
    """

    images: int = attrs.field(default=4096, validator=positive)
    steps: int = attrs.field(default=200, validator=positive)
    probes: int = attrs.field(default=200, validator=positive)
    samples: int = attrs.field(default=2048, validator=positive)
    held_out: int = attrs.field(default=1000, validator=positive)


@attrs.frozen
class World:
    """A dataset's name, and the backbones and rewards that came in its distribution."""

    name: str
    backbones: tuple[str, ...]
    rewards: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> World:
        """The world around a registered dataset.

        Raises ``UnknownNameError`` for a dataset nobody offers, :class:`ConfigError` for one that came alone.
        """
        names = registry()
        home = _distribution(names.dataset(name))
        pairs = [
            (backbone, reward)
            for backbone, reward in names.pairs()
            if _distribution(names.backbone(backbone)) == _distribution(names.reward(reward)) == home
        ]
        if not pairs:
            raise ConfigError(f"{home!r}, which offers the dataset {name!r}, has no backbone and reward to stitch.")
        backbones, rewards = (tuple(dict.fromkeys(column)) for column in zip(*pairs, strict=True))
        return cls(name, backbones, rewards)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every backbone with every reward, backbone by backbone."""
        return [(backbone, reward) for backbone in self.backbones for reward in self.rewards]

    def chosen(self, backbones: Sequence[str] | None, rewards: Sequence[str] | None) -> list[tuple[str, str]]:
        """The pairs of these backbones and rewards, by default of all; :class:`ConfigError` for a foreign name."""
        for asked, there in ((backbones, self.backbones), (rewards, self.rewards)):
            if foreign := sorted(set(asked or ()) - set(there)):
                raise ConfigError(
                    f"{', '.join(foreign)} is not of the world {self.name!r}, which has {', '.join(there)}."
                )
        return [
            (backbone, reward)
            for backbone, reward in self.pairs
            if (backbones is None or backbone in backbones) and (rewards is None or reward in rewards)
        ]


def _distribution(record: Record) -> str | None:
    return record.source.distribution if record.source is not None else None
