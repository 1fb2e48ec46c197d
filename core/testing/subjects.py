"""From a name, a record or an object to what is checked."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from ..backbone import Backbone
from ..errors import ConfigError, UnknownNameError
from ..loading import build_twin, load_aligner, load_backbone, load_reward
from ..records import CAPABILITIES, PLUGIN_KINDS, AlignerRecord, BackboneRecord, CheckedKind, RewardRecord
from ..registries import registry
from ..reward import Reward
from ..slicing import Sliced
from .checks import Subject


def subject_of(given: Any, *, kind: CheckedKind | None = None, lacks: Mapping[str, str] | None = None) -> Subject:
    """What to check: a registered name or a record (its twin is built, or without one its local weights are loaded), or
    an object: a backbone, a reward, or a method with its settings.

    ``kind`` decides where a name stands for several things (an aligner and a trainer never share one). ``lacks`` is the
    family's own unless given. Raises ``UnknownNameError`` and :class:`ConfigError`.
    """
    if isinstance(given, str):
        given = _record_named(given, kind)
    if isinstance(given, BackboneRecord | RewardRecord | AlignerRecord):
        declared = given if isinstance(given, AlignerRecord) else registry().family(given)
        own = declared.checked_kind if isinstance(declared, AlignerRecord) else declared.kind
        ours = declared.lacks if lacks is None else lacks
        return Subject(given.name, own, functools.partial(_open, given), given, _known(own, ours))
    if isinstance(given, type) and issubclass(given, Sliced):
        raise ConfigError(f"{given.__name__} is a class; give a network, such as {given.__name__}.build(twin).")
    own = _kind_of(given)
    plugin = given() if isinstance(given, type) else given
    return Subject(type(plugin).__name__, own, lambda: plugin, None, _known(own, lacks or {}))


def _kind_of(plugin: Any) -> CheckedKind:
    """What an object is taken for; :class:`ConfigError` where it is nothing that there are checks for."""
    if isinstance(plugin, Backbone):
        return "backbone"
    if isinstance(plugin, Reward):
        return "reward"
    if callable(getattr(plugin, "collect", None)):
        return "trainer"
    if callable(getattr(plugin, "run", None)):
        return "aligner"
    raise ConfigError(f"a {type(plugin).__name__} is no backbone, reward or aligner; give one, or its name.")


def _known(kind: CheckedKind, lacks: Mapping[str, str]) -> Mapping[str, str]:
    unknown = sorted(set(lacks) - set(CAPABILITIES[kind]))
    if unknown:
        raise ConfigError(f"lacks names {', '.join(unknown)}; choose from {', '.join(CAPABILITIES[kind])}.")
    return lacks


def _record_named(name: str, kind: CheckedKind | None) -> Any:
    """The one record of that name; an :class:`UnknownNameError` that says what was meant or what to install."""
    names = registry()
    shelves: dict[CheckedKind, Mapping[str, Any]] = {
        "backbone": names.backbones, "reward": names.rewards, "aligner": names.aligners, "trainer": names.aligners,
    }  # fmt: skip
    if kind is not None:
        return shelves[kind][name]
    found = [own for own in PLUGIN_KINDS if name in shelves[own]]
    if len(found) > 1:
        raise ConfigError(f"{name!r} is a {' and a '.join(found)}; say which one (kind).")
    if not found:
        hinted = [own for own in PLUGIN_KINDS if (own, name) in names.hints]
        close = difflib.get_close_matches(name.lower(), [n for shelf in shelves.values() for n in shelf], 1)
        found = hinted or [own for own in PLUGIN_KINDS if close and close[0] in shelves[own]]
    if not found:
        raise UnknownNameError(f"unknown backbone, reward or aligner {name!r}; 'stitchvm list' shows what there is.")
    return shelves[found[0]][name]


def _open(record: BackboneRecord | RewardRecord | AlignerRecord) -> Any:
    """The plugin behind a record, without a download."""
    if isinstance(record, AlignerRecord):
        return load_aligner(record)()
    if record.twin:
        return build_twin(record)
    if record.path is None:
        raise ConfigError(f"{record.name!r} has no twin to check; give its record the table 'twin', a small build().")
    return load_backbone(record) if isinstance(record, BackboneRecord) else load_reward(record)
