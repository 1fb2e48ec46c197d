"""docs/plugins.md and docs/conformance.md: their code is run, and what they say about hooks, capabilities and checks is
what there is."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from stitchvm import core
from stitchvm.core.hookspecs import PREFIX, HookSpecs
from stitchvm.core.records import CAPABILITIES, CHECKED_KINDS
from stitchvm.core.scaffold import plugin_files
from stitchvm.core.testing import BackboneConformance, checks_for, examine

DOCS = Path(__file__).parent.parent / "docs"
GUIDE = "".join((DOCS / name).read_text() for name in ("plugins.md", "conformance.md"))
FILES = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", GUIDE, flags=re.DOTALL))
"""The code of every block that begins with a file's name."""


@pytest.fixture
def guide(install, fresh_registry) -> Path:
    """The guide's files, installed."""
    project = tomllib.loads(FILES["pyproject.toml"])
    points = project["project"]["entry-points"]["stitchvm"]
    site = install(project["project"]["name"], entry_points=points)
    for path, text in FILES.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(text)
    return site


def test_its_backbone_conforms(guide):
    report = examine("tiny")
    assert [failure.message for failure in report.failures] == []
    assert {result.status for result in report.results} == {"passed"}
    assert Path(inspect.getfile(type(core.build_twin(core.registry().backbone("tiny"))))).is_relative_to(guide)


def test_its_tests_run_the_kit(guide, monkeypatch):
    monkeypatch.syspath_prepend(guide / "tests")
    parametrised, by_class = import_module("test_parametrised"), import_module("test_class")
    (mark,) = parametrised.test_conforms.pytestmark
    for bound in mark.args[1]:
        parametrised.test_conforms(bound)
    names = [name for name in dir(by_class.TestTiny) if name.startswith("test_")]
    assert len(names) == len(mark.args[1]) == len(checks_for("backbone"))
    assert issubclass(by_class.TestTiny, BackboneConformance)
    by_class.TestTiny().test_upstream()


def test_its_backbone_is_the_one_that_the_command_writes():
    written = plugin_files("tiny", "backbone")
    shared = set(written) & set(FILES)
    assert shared == {"pyproject.toml", *(f"stitchvm_tiny/{name}.py" for name in ("__init__", "model", "net"))}
    assert {path: FILES[path] for path in shared} == {path: written[path] for path in shared}


def test_every_hook_is_documented_with_its_exact_arguments():
    hooks = [name for name in dir(HookSpecs) if name.startswith(PREFIX)]
    expected = []
    for name in hooks:
        arguments = list(inspect.signature(getattr(HookSpecs, name)).parameters)[1:]
        expected.append(f"### `{name}({', '.join(arguments)})`")
    assert sorted(line for line in GUIDE.splitlines() if line.startswith("### `")) == sorted(expected)


def rows(header: str) -> list[str]:
    """The rows of the table below a header row."""
    _, _, below = GUIDE.partition(header + "\n")
    assert below, header
    lines = below.splitlines()[1:]
    return lines[: next((k for k, line in enumerate(lines) if not line.startswith("|")), len(lines))]


def test_every_check_is_listed_with_its_claim():
    listed: dict[tuple[str, str, str], list[str]] = {}
    for kind in CHECKED_KINDS:
        for check in checks_for(kind):
            listed.setdefault((check.name, check.claim.replace("``", "`"), check.needs), []).append(kind)
    expected = [f"| `{name}` | {', '.join(of)} | {claim} | {needs} |" for (name, claim, needs), of in listed.items()]
    assert rows("| check | of | claim | needs |") == expected


def test_every_capability_is_listed():
    listed: dict[tuple[str, str], list[str]] = {}
    for kind, table in CAPABILITIES.items():
        for name, meaning in table.items():
            listed.setdefault((name, meaning), []).append(kind)
    expected = [f"| `{name}` | {', '.join(of)} | {meaning} |" for (name, meaning), of in listed.items()]
    assert rows("| capability | of | what |") == expected
