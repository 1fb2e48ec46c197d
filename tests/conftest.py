"""What the tests share: nothing is downloaded, and packages that exist for one test alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("STITCHVM_REGISTRY", None)

import pytest

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a fake distribution: ``install("name", modules={"mod": source}, entry_points={"point": "mod"})``.

    A folder with the modules and a ``.dist-info``, on ``sys.path`` as long as the test runs; other files by their
    full name. Returns the folder.
    """
    modules_before = set(sys.modules)

    def make(
        name: str,
        modules: Mapping[str, str] | None = None,
        entry_points: Mapping[str, str] | None = None,
        version: str = "1.0",
        raw_entry_points: str | None = None,
    ) -> Path:
        site = tmp_path / f"site-{name}-{version}"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = "".join(f"{point} = {target}\n" for point, target in (entry_points or {}).items())
        (info / "entry_points.txt").write_text(raw_entry_points or f"[stitchvm]\n{points}")
        for module, source in (modules or {}).items():
            file = site / (module if "." in module else f"{module}.py")
            file.write_text(source)
        monkeypatch.syspath_prepend(site)
        return site

    yield make
    for module in set(sys.modules) - modules_before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """The process's registry is discovered anew in this test, and again after it."""
    from stitchvm.core import registry

    registry.cache_clear()
    yield
    registry.cache_clear()
