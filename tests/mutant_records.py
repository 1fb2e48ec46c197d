"""Broken records and families, one a check of records: the rest of each is a good toy."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import attrs
import torch

import toys
from stitchvm.core import AlignerRecord, BackboneRecord, Family, RewardRecord, Source, registry

Record = BackboneRecord | RewardRecord | AlignerRecord
_BUILDS = count()


class NoBackbone:
    """Builds something that is no network."""

    @classmethod
    def build(cls, architecture, *, device="cpu"):
        return cls()

    @classmethod
    def from_pretrained(cls, record, **options):
        return cls()


class NoMethod:
    """Cannot be run."""

    default_particles = 1


class NoTrainer:
    """Collects, but has no loss."""

    needs_old = False
    samples_per_prompt = 1

    def collect(self, problem, update):
        raise NotImplementedError


class OldBackbone(toys.Backbone):
    """Knows nothing of loading a head alone."""

    @classmethod
    def from_pretrained(cls, record, *, dtype=None, device="cpu", token=None, local_files_only=False):
        raise NotImplementedError


class OldReward(toys.Reward):
    """Knows nothing of devices."""

    @classmethod
    def from_pretrained(cls, record, *, dtype=None, token=None, local_files_only=False):
        raise NotImplementedError


class _NeverTheSame:
    @classmethod
    def build(cls, architecture, *, device="cpu"):
        network = super().build(architecture, device=device)
        if network.device.type != "meta":
            torch.nn.init.constant_(next(network.net.parameters()), 0.01 * (1 + next(_BUILDS)))
        return network


class RestlessBackbone(_NeverTheSame, toys.Backbone):
    """Twins with random weights of their own."""


class RestlessReward(_NeverTheSame, toys.Reward):
    """Twins with random weights of their own."""


class _AlwaysOnTheCpu:
    @classmethod
    def build(cls, architecture, *, device="cpu"):
        return super().build(architecture)


class HeavyBackbone(_AlwaysOnTheCpu, toys.Backbone):
    """Ignores the device."""


class HeavyReward(_AlwaysOnTheCpu, toys.Reward):
    """Ignores the device."""


CLASSES = {
    "builds": {"backbone": "NoBackbone", "reward": "NoBackbone", "aligner": "NoMethod", "trainer": "NoTrainer"},
    "family-class": {"backbone": "OldBackbone", "reward": "OldReward"},
    "twin": {"backbone": "RestlessBackbone", "reward": "RestlessReward"},
    "geometry": {"backbone": "HeavyBackbone", "reward": "HeavyReward"},
}
GOOD = {
    "backbone": "stitchvm_toy_backbone.model:ToyBackboneBackbone",
    "reward": "stitchvm_toy_reward.model:ToyRewardReward",
    "aligner": "stitchvm_toy_aligner.model:ToyAlignerAligner",
    "trainer": "toys:Trainer",
}
RECORD_MUTANTS = {
    "backbone": ("builds", "family-class", "twin", "geometry", "licence", "light"),
    "reward": ("builds", "family-class", "twin", "geometry", "licence", "light"),
    "aligner": ("builds", "light"),
    "trainer": ("builds", "light"),
}


def registered(check: str | None, kind: str, folder: Path) -> Record:
    """A record of the process's registry with the mistake that ``check`` is about; a good one for None."""
    broken = CLASSES.get(check or "", {}).get(kind)
    load = GOOD[kind] if broken is None else f"mutant_records:{broken}"
    plugin = folder / "toy_plugin.py"
    plugin.write_text("import torch\n" if check == "light" else "import json\n")
    source = Source("toy_plugin.py", "", str(plugin), "inline")
    record: Any
    if kind in ("aligner", "trainer"):
        record = AlignerRecord(name="toy", load=load, spec_version=1, trains=kind == "trainer", source=source)
    else:
        family = Family(kind=kind, name="toy", load=load, spec_version=1, source=source)
        registry()._shelf(family).add(family)
        table = toys.BACKBONE_TWIN if kind == "backbone" else toys.REWARD_TWIN
        cls = BackboneRecord if kind == "backbone" else RewardRecord
        record = cls(name="toy", family="toy", licence="mit", architecture=table, twin=table, source=source)
        if check == "licence":
            record = attrs.evolve(record, licence="unknown")
    registry()._shelf(record).add(record)
    return record
