"""Finding plugins: a guarded loop over entry points, in which one broken package never takes the others down."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pluggy

from .errors import PluginLoadError
from .hookspecs import PREFIX, PROJECT, HookSpecs
from .records import Level, Source

GROUP = "stitchvm"
BUILT_IN = "stitchvm"
"""The distribution whose plugins every other one's records outrank."""


@attrs.frozen
class PluginFailure:
    """Something a plugin got wrong: shown by ``stitchvm doctor`` and beside an unknown name, never fatal."""

    distribution: str
    entry_point: str
    message: str

    @classmethod
    def of(cls, source: Source, message: str) -> PluginFailure:
        return cls(source.distribution, source.origin, message)

    def __str__(self) -> str:
        return f"{self.distribution} ({self.entry_point}): {self.message}"


class PrefixedManager(pluggy.PluginManager):
    """Looks at prefixed names only: reading every attribute of a lazy module would import everything behind it."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name.startswith(PREFIX) else None


class Plugins:
    """The plugins of one registry, with what went wrong while loading them."""

    def __init__(self) -> None:
        self.manager = PrefixedManager(PROJECT)
        self.manager.add_hookspecs(HookSpecs)
        self.sources: dict[str, Source] = {}
        self.failures: list[PluginFailure] = []

    def fail(self, source: Source, message: str) -> None:
        """Note a failure once."""
        failure = PluginFailure.of(source, message)
        if failure not in self.failures:
            self.failures.append(failure)

    def load_entry_points(self) -> None:
        """Register every installed distribution's plugins of the group ``stitchvm``."""
        for source, entry_point in _entry_points(self.failures):
            try:
                plugin = entry_point.load()
            except (Exception, SystemExit) as error:  # whatever a stranger's module does at import
                self.fail(source, _import_message(entry_point.value, error))
                continue
            self.register(plugin, source)

    def load_file(self, path: Path) -> Source:
        """Register a single-file plugin; :class:`PluginLoadError` when it cannot be imported or offers nothing."""
        source = Source(path.name, "", str(path), "inline")
        failed_before = len(self.failures)
        self.register(_import_file(path), source)
        if len(self.failures) > failed_before:
            raise PluginLoadError(f"plugin {str(path)!r}: {self.failures.pop().message}")
        return source

    def register(self, plugin: object, source: Source) -> None:
        """Add a plugin under a name of its own, so that equal entry-point names in two packages both count."""
        name = f"{source.level}:{source.distribution}:{source.origin}"
        try:
            self.manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            self.fail(source, f"cannot be registered: {error}")
            return
        self.sources[name] = source
        callers = self.manager.get_hookcallers(plugin) or []
        if not callers:
            self.fail(source, f"offers nothing: it has no function marked @hookimpl whose name begins with {PREFIX!r}.")
        known = [spec for spec in dir(HookSpecs) if spec.startswith(PREFIX)]
        for caller in callers:
            if not caller.has_spec():
                close = difflib.get_close_matches(caller.name, known, 1)
                meant = f" Did you mean {close[0]!r}?" if close else f" Known hooks: {', '.join(known)}."
                self.fail(source, f"implements the unknown hook {caller.name!r}.{meant}")

    def results(self, hook: str, source: Source | None = None) -> Iterator[tuple[Source, Any]]:
        """What each plugin (or the one from ``source``) yields from ``hook``, with where it came from."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            origin = self.sources[implementation.plugin_name]
            if source is not None and origin is not source:
                continue
            try:
                yield from ((origin, item) for item in _items(implementation.function()))
            except (Exception, SystemExit) as error:
                self.fail(origin, f"{hook} failed: {type(error).__name__}: {error}")


def _items(result: Any) -> Iterable[Any]:
    """A hook's result, read to its end before any of it is used."""
    if isinstance(result, str | bytes) or not isinstance(result, Iterable):
        raise TypeError(f"returned {type(result).__name__}, expected an iterable of records (yield each one)")
    return list(result)


def _entry_points(failures: list[PluginFailure]) -> Iterator[tuple[Source, importlib.metadata.EntryPoint]]:
    """Every entry point of the group; of two copies of one distribution, the first on the path counts."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
            name = distribution.metadata["Name"] if points else ""
        except Exception as error:  # a damaged .dist-info of anybody's
            where = str(distribution.locate_file(""))
            message = f"cannot be read: {type(error).__name__}: {error}"
            failures.append(PluginFailure(where, "entry_points.txt", message))
            continue
        key = name.lower().replace("_", "-").replace(".", "-")
        if not points or key in seen:
            continue
        seen.add(key)
        level: Level = "built-in" if key == BUILT_IN else "entry point"
        for point in points:
            yield Source(name, distribution.version, point.name, level), point


def _import_message(what: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"cannot import {what!r}: the module {error.name!r} is not installed."
    return f"cannot import {what!r}: {type(error).__name__}: {error}"


def _import_file(path: Path) -> ModuleType:
    """The module in ``path``, under a name of its own so that its ``load`` strings resolve."""
    if not path.is_file():
        raise PluginLoadError(f"plugin file {str(path)!r} does not exist.")
    name = path.stem if path.stem.isidentifier() else f"plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if loaded is not None or importlib.util.find_spec(name) is not None:
        raise PluginLoadError(f"plugin file {str(path)!r} would hide the module {name!r}; rename the file.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginLoadError(f"plugin file {str(path)!r} is not a Python file; give a .py plugin or a .toml registry.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginLoadError(_import_message(str(path), error)) from error
    return module
