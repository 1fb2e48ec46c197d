"""Writing a new plugin package: complete, installable, and passing the conformance kit as it is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, OutputError
from .files import make_folder, output_errors, write_text
from .records import PLUGIN_KINDS
from .registries import registry

TEMPLATES = Path(__file__).parent / "templates" / "plugin"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def plugin_files(name: str, kind: str) -> dict[str, str]:
    """The text of every file of the package, by its path in it.

    Raises :class:`ConfigError` for another kind, or a name that is not lower-case words joined by hyphens.
    """
    if kind not in PLUGIN_KINDS:
        raise ConfigError(f"kind is {kind!r}; choose one of {', '.join(PLUGIN_KINDS)}.")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name is {name!r}; use lower-case letters, digits and hyphens, such as my-{kind}.")
    package = f"stitchvm_{name.replace('-', '_')}"
    words = {
        "name": name, "kind": kind, "package": package, "distribution": f"stitchvm-{name}",
        "class_name": "".join(word.capitalize() for word in (*name.split("-"), kind)),
        "title": name.replace("-", " ").capitalize(),
    }  # fmt: skip
    templates = {
        "pyproject.toml": "pyproject.toml", "README.md": "README.md", "tests/test_plugin.py": "test_plugin.py",
        f"{package}/__init__.py": f"{kind}_plugin.py", f"{package}/model.py": f"{kind}.py",
    }  # fmt: skip
    if kind != "aligner":
        templates[f"{package}/net.py"] = f"{kind}_net.py"
    return {path: _render(template, words) for path, template in templates.items()}


def _render(template: str, words: Mapping[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    # Python and TOML, not HTML: nothing is escaped
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    return environment.get_template(f"{template}.jinja").render(words)


def new_plugin(name: str, kind: str, out: str | Path | None = None) -> Path:
    """Write the package into the new folder ``out`` (``stitchvm-NAME`` here, by default) and return it.

    All of it appears at once or not at all. Raises :class:`ConfigError` for a bad name, or one that something installed
    has already, and :class:`OutputError` for a folder that is there already or cannot be written.
    """
    files = plugin_files(name, kind)
    _check_free(name, kind)
    folder = Path(out if out is not None else f"stitchvm-{name}").expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} is there already; choose another --out, or remove it.")
    temporary = make_folder(folder.parent) / f".{folder.name}.{os.getpid()}.tmp"
    try:
        for path, text in files.items():
            make_folder((temporary / path).parent)
            write_text(temporary / path, text)
        with output_errors(folder):
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_free(name: str, kind: str) -> None:
    names = registry()
    shelves: dict[str, tuple[Mapping[str, Any], ...]] = {
        "backbone": (names.backbones, names.backbone_families), "reward": (names.rewards, names.reward_families),
        "aligner": (names.aligners,),
    }  # fmt: skip
    for shelf in shelves[kind]:
        if name in shelf:
            raise ConfigError(f"the name {name!r} is taken by {shelf[name].source}; choose another one.")
