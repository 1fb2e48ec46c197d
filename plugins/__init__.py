"""The built-in plugins. This one ships ``registry.toml``, the names of models and methods."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stitchvm.core import hookimpl


@hookimpl
def stitchvm_registries() -> Iterable[Path]:
    """``registry.toml``: beside this package in the wheel, at the top of the repository in a checkout."""
    yield Path(__file__).parent.parent / "registry.toml"
