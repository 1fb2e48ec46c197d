"""The hooks a plugin package may implement: discovery only, each docstring a complete small plugin.

A package names its plugin modules in the entry-point group ``stitchvm``::

    [project.entry-points.stitchvm]
    my-models = "my_package.plugin"

Hooks take no argument and yield records; what a record's ``load`` names is imported when a model is first used, so a
plugin module itself must import nothing heavy. Only names that begin with ``stitchvm_`` are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pluggy

from .records import AlignerRecord, BackboneRecord, Family, RewardRecord

PROJECT = "stitchvm"
PREFIX = "stitchvm_"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Called once each, when a registry is first asked for something; every implementation's records are joined."""

    @hookspec
    def stitchvm_backbones(self) -> Iterable[Family | BackboneRecord]:
        """Backbone families, and named backbones of any family.

        ::

            from stitchvm.core import BackboneRecord, Family, hookimpl

            @hookimpl
            def stitchvm_backbones():
                yield Family(kind="backbone", name="sana", load="stitchvm_sana.model:Sana", spec_version=1,
                             requires=("diffusers",), install="stitchvm-sana[diffusers]",
                             pipelines=("SanaPipeline",))  # what core.backbone_from hands to Sana.from_pipeline
                yield BackboneRecord(name="sana-1.6b", family="sana", repo="some-lab/sana-1.6b-diffusers",
                                     dtype="bfloat16", licence="apache-2.0", architecture={...}, twin={...})
        """
        raise NotImplementedError

    @hookspec
    def stitchvm_rewards(self) -> Iterable[Family | RewardRecord]:
        """Reward families, and named rewards of any family.

        ::

            from stitchvm.core import RewardRecord, hookimpl

            @hookimpl
            def stitchvm_rewards():
                yield RewardRecord(name="my-clip", family="clip", path="/models/my-clip", filename="model.safetensors",
                                   licence="mit", architecture={...}, twin={...})
        """
        raise NotImplementedError

    @hookspec
    def stitchvm_aligners(self) -> Iterable[AlignerRecord]:
        """Alignment methods: classes that take an estimator and never ask which.

        ::

            from stitchvm.core import AlignerRecord, hookimpl

            @hookimpl
            def stitchvm_aligners():
                yield AlignerRecord(name="my-method", load="my_package.method:MyMethod", spec_version=1)
        """
        raise NotImplementedError

    @hookspec
    def stitchvm_registries(self) -> Iterable[str | Path]:
        """Registry files that a package ships.

        Their tables are ``[backbones.NAME]``, ``[rewards.NAME]``, ``[aligners.NAME]`` and ``[datasets.NAME]`` with the
        fields of the records, and ``[known.NAME]`` for names that live in yet other packages (:class:`Hint`).

        ::

            from pathlib import Path

            from stitchvm.core import hookimpl

            @hookimpl
            def stitchvm_registries():
                yield Path(__file__).parent / "registry.toml"
        """
        raise NotImplementedError
