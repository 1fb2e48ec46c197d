"""What the tests share: nothing is downloaded, packages that exist for one test alone, and a table of parities."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("STITCHVM_REGISTRY", None)
os.environ["STITCHVM_DEVICE"] = "cpu"
if "PYTEST_XDIST_WORKER" in os.environ:
    # as many processes as cores, so one thread each: more would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

Install = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backbones", metavar="NAMES", help="test_pairs: only the pairs of these backbones, separated by commas"
    )


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
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_registry: None) -> Run:
    """Run the command line in this process: ``run("list", "sd3*") -> (exit code, output, errors)``."""
    from stitchvm.core import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stitchvm", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def parity(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[str, str], None]:
    """``parity("resume", "cuts 0-3")``: this test's case agreed there bit for bit; the summary shows all as a table."""
    case = request.node.callspec.id

    def note(check: str, where: str) -> None:
        record_property("parity", (case, check, where))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The parity table: what passed, by case and check."""
    table: dict[str, dict[str, str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "parity" and report.when == "call":
                table.setdefault(value[0], {})[value[1]] = value[2]
    if not table:
        return
    checks = list(dict.fromkeys(check for row in table.values() for check in row))
    terminalreporter.section("equal bit for bit, in float32 on the CPU")
    for head, row in [("", {check: check for check in checks}), *table.items()]:
        terminalreporter.write_line(f"{head:32}" + "".join(f"{row.get(check, ''):16}" for check in checks))


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """The process's registry is discovered anew in this test, and again after it."""
    from stitchvm.core import registry

    registry.cache_clear()
    yield
    registry.cache_clear()
