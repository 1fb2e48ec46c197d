"""Every name that plugins and registry files offer, and what to say about a name that nobody offers."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs

from .discovery import PluginFailure, Plugins
from .errors import ConfigError, PluginConflictError, StitchError, UnknownNameError
from .records import (
    LEVELS,
    SPEC_VERSION,
    AlignerRecord,
    BackboneRecord,
    DatasetRecord,
    Family,
    Hint,
    Record,
    RewardRecord,
    Source,
)
from .structuring import structure

USER_REGISTRY = "STITCHVM_REGISTRY"
"""Environment variable: registry files (or single-file plugins) of the user's own, separated like ``PATH``."""

CONFLICT = "conflict"
"""In a distribution's place: a problem of two that are each in order."""

R = TypeVar("R", Family, BackboneRecord, RewardRecord, AlignerRecord, DatasetRecord)

_TABLES: dict[str, type[Record]] = {
    "backbones": BackboneRecord,
    "rewards": RewardRecord,
    "aligners": AlignerRecord,
    "datasets": DatasetRecord,
}
_HOOKS: dict[str, tuple[str, tuple[type, ...]]] = {
    "stitchvm_backbones": ("backbone", (Family, BackboneRecord)),
    "stitchvm_rewards": ("reward", (Family, RewardRecord)),
    "stitchvm_aligners": ("aligner", (AlignerRecord,)),
}


class Shelf(Mapping[str, R], Generic[R]):
    """The records of one kind by name or alias; iterates, sorted, over the names that can be used.

    A missing name raises :class:`UnknownNameError`, one that two sources of equal rank claim
    :class:`PluginConflictError`.
    """

    def __init__(self, kind: str, unknown: Callable[[str, str, Iterable[str]], UnknownNameError]) -> None:
        self.kind = kind
        self._unknown = unknown
        self._claims: dict[str, list[R]] = {}

    def add(self, record: R) -> None:
        for name in (record.name, *getattr(record, "aliases", ())):
            self._claims.setdefault(name, []).append(record)

    def __getitem__(self, name: str) -> R:
        if name not in self._claims:
            raise self._unknown(self.kind, name, self)
        best = self._best(name)
        if len(best) > 1:
            raise PluginConflictError(self.conflict(name))
        return best[0]

    def __contains__(self, name: object) -> bool:
        return name in self._claims

    def __iter__(self) -> Iterator[str]:
        return (n for n in sorted(self._claims) if len(best := self._best(n)) == 1 and best[0].name == n)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def claims(self) -> Iterator[R]:
        """Every record that was offered, by name, those that another one outranks among them."""
        return (record for name in sorted(self._claims) for record in self._claims[name] if record.name == name)

    def conflicts(self) -> Iterator[str]:
        """The names that cannot be used because two sources claim them."""
        return (name for name in sorted(self._claims) if len(self._best(name)) > 1)

    def conflict(self, name: str) -> str:
        """What to say about such a name."""
        both = " and ".join(str(record.source) for record in self._best(name))
        return f"{self.kind} {name!r} is offered by {both}; uninstall or rename one of them."

    def _best(self, name: str) -> list[R]:
        """The claims at the highest level present."""
        claims = self._claims[name]
        rank = min(LEVELS.index(_source(record).level) for record in claims)
        return [record for record in claims if LEVELS.index(_source(record).level) == rank]


def _source(record: Any) -> Source:
    source = record.source
    assert isinstance(source, Source), "a registry stamps every record it takes in"
    return source


class Registry:
    """Names and what they stand for: inline plugins before entry points before built-ins; hints answer for the rest.

    ``Registry()`` is empty; :meth:`discover` asks the installed packages and :data:`USER_REGISTRY`.
    """

    def __init__(self) -> None:
        self.plugins = Plugins()
        self.backbone_families: Shelf[Family] = Shelf("backbone family", self._unknown)
        self.reward_families: Shelf[Family] = Shelf("reward family", self._unknown)
        self.backbones: Shelf[BackboneRecord] = Shelf("backbone", self._unknown)
        self.rewards: Shelf[RewardRecord] = Shelf("reward", self._unknown)
        self.aligners: Shelf[AlignerRecord] = Shelf("aligner", self._unknown)
        self.datasets: Shelf[DatasetRecord] = Shelf("dataset", self._unknown)
        self.hints: dict[tuple[str, str], Hint] = {}

    @classmethod
    def discover(cls) -> Registry:
        """A registry of everything installed; failures are collected, see :meth:`problems`."""
        registry = cls()
        registry.plugins.load_entry_points()
        registry._collect()
        for name in filter(None, os.environ.get(USER_REGISTRY, "").split(os.pathsep)):
            try:
                registry.add(name)
            except StitchError as error:
                registry.plugins.failures.append(PluginFailure(USER_REGISTRY, name, str(error)))
        return registry

    @classmethod
    def load(cls, *paths: str | Path) -> Registry:
        """Everything installed, and the registry files (``.toml``) or single-file plugins (``.py``) at ``paths``."""
        registry = cls.discover()
        for path in paths:
            registry.add(path)
        return registry

    def add(self, path: str | Path) -> None:
        """Take in one registry file or single-file plugin, which outranks everything installed.

        Raises :class:`ConfigError` or ``PluginLoadError`` for a file with a mistake in it.
        """
        file = Path(path).expanduser().absolute()
        failed_before = len(self.plugins.failures)
        if file.suffix == ".toml":
            self._read(file, Source(file.name, "", str(file), "inline"))
        else:
            self._collect(self.plugins.load_file(file))
        fresh = self.plugins.failures[failed_before:]
        if fresh:
            del self.plugins.failures[failed_before:]
            raise ConfigError("\n".join(failure.message for failure in fresh))

    def backbone(self, name: str) -> BackboneRecord:
        return self.backbones[name]

    def reward(self, name: str) -> RewardRecord:
        return self.rewards[name]

    def aligner(self, name: str) -> AlignerRecord:
        return self.aligners[name]

    def dataset(self, name: str) -> DatasetRecord:
        return self.datasets[name]

    def family(self, record: BackboneRecord | RewardRecord) -> Family:
        """The code behind a record; :class:`UnknownNameError` when no plugin offers its family."""
        shelf = self.backbone_families if isinstance(record, BackboneRecord) else self.reward_families
        return shelf[record.family]

    def list(self, pattern: str = "*") -> tuple[Record, ...]:
        """Backbones, rewards, aligners and datasets whose name or alias matches a shell pattern, by kind and name."""
        shelves: tuple[Shelf[Any], ...] = (self.backbones, self.rewards, self.aligners, self.datasets)
        return tuple(
            record
            for shelf in shelves
            for record in shelf.values()
            if any(fnmatch.fnmatchcase(n, pattern) for n in (record.name, *getattr(record, "aliases", ())))
        )

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every (backbone, reward) whose families are known: each can be stitched."""
        backbones = [n for n, record in self.backbones.items() if record.family in self.backbone_families]
        rewards = [n for n, record in self.rewards.items() if record.family in self.reward_families]
        return tuple((backbone, reward) for backbone in backbones for reward in rewards)

    def problems(self) -> tuple[PluginFailure, ...]:
        """Plugins that failed, names claimed twice, and records whose family nobody offers."""
        found = [*self.plugins.failures]
        for shelf in self._shelves():
            found += [PluginFailure(CONFLICT, name, shelf.conflict(name)) for name in shelf.conflicts()]
        named: tuple[BackboneRecord | RewardRecord, ...] = (*self.backbones.values(), *self.rewards.values())
        for record in named:
            try:
                self.family(record)
            except UnknownNameError as error:
                message = f"{record.name!r} cannot be used: {str(error).splitlines()[0]}"
                found.append(PluginFailure.of(_source(record), message))
            except PluginConflictError:  # already reported, as a name claimed twice
                continue
        return tuple(found)

    def shelves(self) -> dict[str, Shelf[Any]]:
        """Everything there is to offer, by kind."""
        return {shelf.kind: shelf for shelf in self._shelves()}

    def _shelves(self) -> tuple[Shelf[Any], ...]:
        families = (self.backbone_families, self.reward_families)
        return (*families, self.backbones, self.rewards, self.aligners, self.datasets)

    def _shelf(self, record: Family | Record) -> Shelf[Any]:
        if isinstance(record, Family):
            return self.backbone_families if record.kind == "backbone" else self.reward_families
        homes: dict[type, Shelf[Any]] = {
            BackboneRecord: self.backbones,
            RewardRecord: self.rewards,
            AlignerRecord: self.aligners,
            DatasetRecord: self.datasets,
        }
        return homes[type(record)]

    def _collect(self, only: Source | None = None) -> None:
        """Ask the plugins (or one of them) what they offer."""
        for source, path in self.plugins.results("stitchvm_registries", only):
            if isinstance(path, str | Path):
                self._read(Path(path), source)
            else:
                self.plugins.fail(source, f"stitchvm_registries yielded {type(path).__name__}, expected a path.")
        for hook, (kind, accepted) in _HOOKS.items():
            for source, item in self.plugins.results(hook, only):
                fault = _fault(hook, kind, accepted, item)
                if fault:
                    self.plugins.fail(source, fault)
                else:
                    self._shelf(item).add(attrs.evolve(item, source=source))

    def _read(self, path: Path, source: Source) -> None:
        """Take in a registry file; a table with a mistake is reported and left out, the others count."""
        source = attrs.evolve(source, origin=str(path))
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.plugins.fail(source, f"registry file {str(path)!r} cannot be read: {error.strerror or error}.")
            return
        except ValueError as error:
            self.plugins.fail(source, f"registry file {str(path)!r} is not valid TOML: {error}.")
            return
        version = tables.pop("spec_version", SPEC_VERSION)
        if version != SPEC_VERSION:
            self.plugins.fail(source, f"registry file {str(path)!r}: {_version_message(version)}")
            return
        for kind, name, table in self._entries(tables, path, source):
            try:
                self._take(kind, name, table, path, source)
            except ConfigError as error:
                self.plugins.fail(source, str(error))

    def _entries(self, tables: dict[str, Any], path: Path, source: Source) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """``(kind, name, table)`` of everything in a registry file that has the right shape."""
        for kind, entries in tables.items():
            if kind not in _TABLES and kind != "known":
                known = ", ".join(f"[{table}.NAME]" for table in (*_TABLES, "known"))
                self.plugins.fail(source, f"{path}: unknown table [{kind}], expected {known}.")
            elif not isinstance(entries, dict) or not all(isinstance(table, dict) for table in entries.values()):
                self.plugins.fail(source, f"{path}: [{kind}] must hold tables, one a name: [{kind}.NAME].")
            else:
                yield from ((kind, name, table) for name, table in entries.items())

    def _take(self, kind: str, name: str, table: dict[str, Any], path: Path, source: Source) -> None:
        where = f"{path} [{kind}.{name}]"
        if "name" in table:
            raise ConfigError(f"{where}: unknown key 'name'; the table's own name is the record's.")
        if kind == "known":
            hint = structure(Hint, {"name": name, **table}, where)
            self.hints[hint.kind, name] = attrs.evolve(hint, source=source)
            return
        record = structure(_TABLES[kind], {"name": name, **table}, where)
        if isinstance(record, BackboneRecord | RewardRecord) and record.path is not None:
            record = attrs.evolve(record, path=str((path.parent / Path(record.path).expanduser()).resolve()))
        if isinstance(record, AlignerRecord) and record.spec_version != SPEC_VERSION:
            raise ConfigError(f"{where}: {_version_message(record.spec_version)}")
        self._shelf(record).add(attrs.evolve(record, source=source))

    def _unknown(self, kind: str, name: str, installed: Iterable[str]) -> UnknownNameError:
        """What to type next: the name that was meant, the package to install, or one of the names there are."""
        hint = self.hints.get((kind, name))
        if hint is not None:
            return UnknownNameError(f"{kind} {name!r} lives in a package of its own: pip install '{hint.install}'.")
        names = tuple(installed)
        hinted = tuple(n for k, n in self.hints if k == kind)
        close = difflib.get_close_matches(name.lower(), (*names, *hinted), 1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        there = f" Installed: {', '.join(names)}." if names else f" No {kind} is installed."
        failed = "".join(f"\nA plugin failed to load: {failure}" for failure in self.plugins.failures)
        return UnknownNameError(f"unknown {kind} {name!r}.{meant}{there}{failed}")


def _fault(hook: str, kind: str, accepted: tuple[type, ...], item: Any) -> str | None:
    """What is wrong with something a hook yielded, or None."""
    if not isinstance(item, accepted):
        wanted = " or ".join(cls.__name__ for cls in accepted)
        return f"{hook} yielded {type(item).__name__}, expected {wanted}."
    if isinstance(item, Family) and item.kind != kind:
        return f"{hook} yielded the {item.kind} family {item.name!r}; yield it from stitchvm_{item.kind}s."
    if isinstance(item, Family | AlignerRecord) and item.spec_version != SPEC_VERSION:
        return f"{item.name!r} {_version_message(item.spec_version)}"
    if isinstance(item, BackboneRecord | RewardRecord) and item.path and not Path(item.path).is_absolute():
        return f"{hook} yielded {item.name!r} with the relative path {item.path!r}; give an absolute one."
    return None


def _version_message(version: Any) -> str:
    way_out = "upgrade the plugin" if isinstance(version, int) and version < SPEC_VERSION else "upgrade stitchvm"
    return f"was written for plugin specification {version}, this StitchVM has {SPEC_VERSION}: {way_out}."


@functools.cache
def registry() -> Registry:
    """The process's own registry, discovered on first use."""
    return Registry.discover()


def pairs() -> tuple[tuple[str, str], ...]:
    """Every (backbone, reward) pair of names that can be stitched."""
    return registry().pairs()
