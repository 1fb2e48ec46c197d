"""What plugins and registry files describe: typed, frozen records, JSON-able and free of torch.

A *family* is code: one slicing class that fits many checkpoints. A *record* gives a name to settings of a family.
Hooks and registry files yield these descriptions, never models; ``load`` strings are resolved on first use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs

SPEC_VERSION = 1
"""The hook specification this core implements; raised whenever an existing plugin would have to change."""

Kind = Literal["backbone", "reward", "aligner", "dataset"]
Level = Literal["inline", "entry point", "built-in"]
DType = Literal["float32", "float16", "bfloat16"]
ConditionKind = Literal["prompts", "images", "nothing"]
"""What a reward compares an image with: its prompt, reference images, or nothing."""
MetricKind = Literal["recall", "preference", "rank", "similarity"]
"""The skill a reward is measured by: see :mod:`stitchvm.core.metrics`."""
METRICS: tuple[MetricKind, ...] = ("recall", "preference", "rank", "similarity")

PluginKind = Literal["backbone", "reward", "aligner"]
"""What a package may add that the conformance kit checks."""
PLUGIN_KINDS: tuple[PluginKind, ...] = ("backbone", "reward", "aligner")
CheckedKind = Literal["backbone", "reward", "aligner", "trainer"]
"""What the conformance kit tells apart: an aligner that trains weights is a trainer."""
CHECKED_KINDS: tuple[CheckedKind, ...] = ("backbone", "reward", "aligner", "trainer")

CAPABILITIES: dict[str, dict[str, str]] = {
    "backbone": {
        "upstream": "an upstream forward pass that slicing is compared with",
        "rectangles": "latents that are not square",
        "prompts": "text conditioning",
        "bfloat16": "half precision",
        "checkpointing": "gradient checkpointing",
    },
    "reward": {
        "upstream": "an upstream forward pass that slicing is compared with",
        "positions": "a positional embedding that can be added once more",
        "bfloat16": "half precision",
        "checkpointing": "gradient checkpointing",
    },
    "aligner": {
        "estimator": "steering by an estimator's value",
        "particles": "any number of particles a prompt",
    },
    "trainer": {
        "estimator": "training by an estimator's value",
    },
}
"""What a plugin of each kind is taken to be able to do unless its ``lacks`` says otherwise."""

LEVELS: tuple[Level, ...] = ("inline", "entry point", "built-in")
"""Which record wins a name, first to last; equal names at one level are a conflict."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_LOAD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _check_name(record: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{attribute.name} is {value!r}; use lower-case letters, digits, '.', '_' and '-'")


def _check_names(record: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    for name in value:
        _check_name(record, attribute, name)  # type: ignore[arg-type]


def _check_load(record: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or not _LOAD.fullmatch(value):
        raise ValueError(f"{attribute.name} is {value!r}; write 'package.module:Class'")


def _check_path(record: Any, attribute: attrs.Attribute[str | None], value: str | None) -> None:
    if value is not None and record.repo is not None:
        raise ValueError("give 'repo' or 'path', not both")


def _strings(value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ValueError(f"got the single string {value!r}; write a list or tuple of strings")
    return tuple(value)


def _check_lacks(record: Any, attribute: attrs.Attribute[Mapping[str, str]], value: Mapping[str, str]) -> None:
    known = CAPABILITIES[record.kind if isinstance(record, Family) else record.checked_kind]
    for capability, reason in value.items():
        if capability not in known:
            raise ValueError(f"lacks names {capability!r}; choose from {', '.join(known)}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"lacks.{capability} is {reason!r}; write why, in a few words")


_LACKS: Any = [attrs.validators.instance_of(dict), _check_lacks]


def _name() -> str:
    return attrs.field(validator=_check_name)


def _load() -> str:
    return attrs.field(validator=_check_load)


def _aliases() -> tuple[str, ...]:
    return attrs.field(default=(), converter=_strings, validator=_check_names)


@attrs.frozen
class Source:
    """Where a record came from: the distribution, its version, and the entry point or file inside it.

    Every record's ``source`` is filled in by the registry; a plugin leaves it alone.
    """

    distribution: str
    version: str
    origin: str
    level: Level

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.origin})".replace("  ", " ")


@attrs.frozen(kw_only=True)
class Family:
    """Code for one architecture: how to slice it, build it and read its checkpoints.

    ``load`` names a class with the contract of :class:`~stitchvm.core.BackboneFamily` or ``RewardFamily``; ``requires``
    the modules it imports beyond the core's own, ``install`` the pip requirement that brings them. ``pipelines`` names
    the classes of loaded pipelines whose backbone its ``from_pipeline`` gives. ``lacks`` maps each of the
    :data:`CAPABILITIES` that it does not have to the reason; ``stitchvm check`` shows those as not applicable.
    ``spec_version`` is the number the plugin was written for, spelled out rather than copied from the core.
    """

    kind: Literal["backbone", "reward"] = attrs.field(validator=attrs.validators.in_(("backbone", "reward")))
    name: str = _name()
    load: str = _load()
    spec_version: int
    requires: tuple[str, ...] = attrs.field(default=(), converter=_strings)
    install: str = ""
    pipelines: tuple[str, ...] = attrs.field(default=(), converter=_strings)
    lacks: dict[str, str] = attrs.field(factory=dict, validator=_LACKS)
    description: str = ""
    source: Source | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen(kw_only=True)
class BackboneRecord:
    """A named diffusion backbone.

    ``repo`` (hub id) or ``path`` (a folder, relative to the registry file) says where the weights are; ``dtype`` the
    precision they are used in; ``resolution`` the native image side in pixels. ``architecture`` is what the family's
    ``build`` takes at full size and ``twin`` the same, shrunk until it runs in milliseconds.
    """

    name: str = _name()
    family: str = _name()
    repo: str | None = None
    path: str | None = attrs.field(default=None, validator=_check_path)
    revision: str | None = None
    dtype: DType = attrs.field(default="float32", validator=attrs.validators.in_(("float32", "float16", "bfloat16")))
    licence: str = "unknown"
    gated: bool = False
    resolution: int = attrs.field(default=1024, validator=attrs.validators.gt(0))
    architecture: dict[str, Any] = attrs.field(factory=dict)
    twin: dict[str, Any] = attrs.field(factory=dict)
    description: str = ""
    aliases: tuple[str, ...] = _aliases()
    source: Source | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen(kw_only=True)
class RewardRecord:
    """A named reward model; as :class:`BackboneRecord`.

    ``filename`` is the checkpoint in ``repo`` or ``path``. ``condition`` says what its score compares an image with; a
    family that compares with something else is refused when it is loaded (None: whatever the family does). ``metric``
    is the skill it is measured by (None: recall for a reward that reads prompts, rank for one that reads nothing,
    similarity for one that compares with images).
    """

    name: str = _name()
    family: str = _name()
    repo: str | None = None
    path: str | None = attrs.field(default=None, validator=_check_path)
    filename: str | None = None
    condition: ConditionKind | None = attrs.field(
        default=None, validator=attrs.validators.in_((None, "prompts", "images", "nothing"))
    )
    metric: MetricKind | None = attrs.field(default=None, validator=attrs.validators.in_((None, *METRICS)))
    revision: str | None = None
    licence: str = "unknown"
    gated: bool = False
    architecture: dict[str, Any] = attrs.field(factory=dict)
    twin: dict[str, Any] = attrs.field(factory=dict)
    description: str = ""
    aliases: tuple[str, ...] = _aliases()
    source: Source | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen(kw_only=True)
class AlignerRecord:
    """A named alignment method: an attrs class whose fields are its settings; ``lacks`` as in :class:`Family`.

    ``trains``: it changes the backbone's weights (:class:`~stitchvm.core.TrainingMethod`), instead of steering its
    samples (:class:`~stitchvm.core.Aligner`).
    """

    name: str = _name()
    load: str = _load()
    spec_version: int
    trains: bool = False
    requires: tuple[str, ...] = attrs.field(default=(), converter=_strings)
    install: str = ""
    lacks: dict[str, str] = attrs.field(factory=dict, validator=_LACKS)
    description: str = ""
    source: Source | None = attrs.field(default=None, eq=False, repr=False)

    @property
    def checked_kind(self) -> CheckedKind:
        """What the conformance kit takes it for."""
        return "trainer" if self.trains else "aligner"


@attrs.frozen(kw_only=True)
class DatasetRecord:
    """A named image source that lives in a package."""

    name: str = _name()
    load: str = _load()
    description: str = ""
    source: Source | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen(kw_only=True)
class Hint:
    """A name that another package offers, so that the answer to a missing one is "install X"."""

    name: str = _name()
    kind: Kind = attrs.field(validator=attrs.validators.in_(("backbone", "reward", "aligner", "dataset")))
    install: str = attrs.field(validator=attrs.validators.min_len(1))
    source: Source | None = attrs.field(default=None, eq=False, repr=False)


Record = BackboneRecord | RewardRecord | AlignerRecord | DatasetRecord


class Recorded(Protocol):
    """A network, or a sum of them, with the record that it was loaded by, or None."""

    record: Any


def name_of(network: Recorded) -> str:
    """The name a network was loaded under, or its class's when it was built by hand."""
    return str(network.record.name) if network.record is not None else type(network).__name__
