"""The entry point: the world's models and data come into StitchVM through a registry file, like any package's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stitchvm.core import hookimpl


@hookimpl
def stitchvm_registries() -> Iterable[Path]:
    """The registry file of this package."""
    yield Path(__file__).parent / "registry.toml"
