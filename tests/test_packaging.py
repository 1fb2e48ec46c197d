"""What is shipped and what may import what."""

from __future__ import annotations

import ast
import importlib.metadata
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import stitchvm.plugins
from stitchvm import core

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]

CORE = sorted((ROOT / "core").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*/stitchvm_*/**/*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """``(module, names, level)`` of every import in a file, whether at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names), node.level
        elif isinstance(node, ast.Import):
            yield from ((alias.name, (), 0) for alias in node.names)


def test_every_package_folder_is_listed():
    folders = {path.parent for path in (*CORE, *PLUGINS)}
    expected = {"stitchvm." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == expected | {"stitchvm"}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_package_data_exists():
    for package, files in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"][package]
        for pattern in files:
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


def test_every_file_that_is_no_module_is_package_data():
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / SETUPTOOLS["package-dir"][package]).glob(pattern)
    }
    files = {path for top in ("core", "plugins") for path in (ROOT / top).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= shipped


def test_no_module_lies_beside_the_mapped_root():
    assert list(ROOT.glob("*.py")) == [], "it would be installed as a module of stitchvm"


def test_registry_is_found_where_it_was_installed():
    (path,) = stitchvm.plugins.stitchvm_registries()
    assert tomllib.loads(path.read_text()) == tomllib.loads((ROOT / "registry.toml").read_text())


def test_entry_points_are_installed_and_import():
    points = importlib.metadata.distribution("stitchvm").entry_points
    installed = {point.name: point.value for point in points if point.group == "stitchvm"}
    assert installed == PROJECT["project"]["entry-points"]["stitchvm"]
    for target in installed.values():
        assert import_module(target).__doc__


def test_ci_runs_the_readme_s_test_command():
    (line,) = (line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("TEST_COMMAND="))
    assert line.partition("=")[2].strip('"') in (ROOT / "README.md").read_text()


def test_versions_agree():
    assert importlib.metadata.version("stitchvm") == PROJECT["project"]["version"]


def test_dependencies_have_upper_bounds():
    project = PROJECT["project"]
    extras = (item for extra in project["optional-dependencies"].values() for item in extra)
    loose = [
        item for item in (*project["dependencies"], *extras) if "<" not in item and not item.startswith("stitchvm[")
    ]
    assert loose == []


@pytest.mark.parametrize("name", core.__all__)
def test_public_names_resolve(name):
    assert getattr(core, name) is not None
    assert name in dir(core)


def test_no_module_hides_a_public_name():
    modules = {path.stem for path in (ROOT / "core").iterdir()}
    assert modules & set(core.__all__) == set()


def test_public_names_are_the_ones_type_checkers_see():
    tree = ast.parse((ROOT / "core" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(typed) == sorted(core.__all__)
    assert typed == core._HOME


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'stich'"):
        _ = core.stich


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_imports_relatively_and_no_plugin(path):
    forbidden = {"stitchvm", "plugins", "core", "diffusers", "transformers", "open_clip", "timm"}
    forbidden |= {file.parent.name for file in EXAMPLES}
    found = [module for module, _, level in imports(path) if level == 0 and module.partition(".")[0] in forbidden]
    assert found == []


STANDS_ON = {
    "alignment": set(), "stitching": set(), "training": {"alignment"}, "diagnosis": {"alignment"},
    "planning": {"stitching"}, "reproduction": {"alignment", "planning", "stitching", "training"},
    "testing": {"alignment", "training"},
}  # fmt: skip
"""Of each task's folder of core, which others it may import; the command line stands on all of them."""
ON_TOP = ("__init__.py", "quickstart.py")
"""What may import tasks though it lies beside their folders."""


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_tasks_stand_on_what_they_share_and_not_the_other_way_round(path):
    parts = path.relative_to(ROOT / "core").parts
    task = parts[0] if len(parts) > 1 else ""
    if task == "cli" or (not task and parts[0] in ON_TOP):
        return
    up = 2 if task else 1
    named = [module or name for module, names, level in imports(path) if level == up for name in names]
    found = {name.partition(".")[0] for name in named}
    assert found & (STANDS_ON.keys() | {"cli", "quickstart"}) <= STANDS_ON.get(task, set())


def test_every_folder_of_core_says_what_it_stands_on():
    folders = {path.parent.name for path in CORE} - {"core", "cli"}
    assert folders == STANDS_ON.keys()


@pytest.mark.parametrize("path", [*PLUGINS, *EXAMPLES], ids=relative)
def test_plugins_use_only_the_public_core(path):
    for module, names, level in imports(path):
        if level == 0 and module.startswith("stitchvm."):
            assert module == "stitchvm.core", f"{module} is not public"
            assert set(names) <= set(core.__all__)


@pytest.mark.parametrize("path", [*CORE, *PLUGINS, *EXAMPLES], ids=relative)
def test_weights_are_never_unpickled(path):
    tree = ast.parse(path.read_text())
    assert {"pickle", "joblib", "dill"}.isdisjoint(module.partition(".")[0] for module, _, _ in imports(path))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert safe.get("weights_only") == "True", f"line {call.lineno}"
        assert all(keyword.arg != "trust_remote_code" for keyword in call.keywords)


def test_the_workflow_takes_its_pairs_from_the_list():
    """The jobs of the pair matrix are what ``stitchvm pairs --github`` prints, run as test_pairs.py understands it."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert 'echo "matrix=$(stitchvm pairs --github)" >> "$GITHUB_OUTPUT"' in workflow
    assert "matrix: ${{ fromJSON(needs.list-pairs.outputs.matrix) }}" in workflow
    assert 'pytest -n 2 tests/test_pairs.py --backbones "${{ matrix.backbones }}"' in workflow
    assert all(f"dist/{name}-*.whl" in workflow for name in ("stitchvm_shapes", "stitchvm_pixart_example"))
