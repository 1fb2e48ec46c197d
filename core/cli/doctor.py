"""``stitchvm doctor``: what is installed, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import attrs
import typer

from ..devices import VARIABLE as DEVICE
from ..loading import missing_modules
from ..records import SPEC_VERSION, Source
from ..registries import CONFLICT, USER_REGISTRY, Registry, registry
from .output import Json, print_json, print_table

_LIBRARIES = ("stitchvm", "torch", "diffusers", "transformers", "open_clip_torch", "huggingface_hub", "safetensors")
_VARIABLES = (USER_REGISTRY, DEVICE, "HF_HOME", "HF_HUB_OFFLINE")


def command(as_json: Json = False) -> None:
    """Show versions and plugins; exit with 1 when a plugin is broken or a name is claimed twice."""
    report = _report(registry())
    if as_json:
        print_json(report)
    else:
        _print(report)
    if report["problems"]:
        raise typer.Exit(1)


def _report(names: Registry) -> dict[str, Any]:
    families = (*names.backbone_families.values(), *names.reward_families.values())
    return {
        "versions": {
            "python": platform.python_version(),
            "plugin specification": str(SPEC_VERSION),
            **{name: _version(name) for name in _LIBRARIES},
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "plugins": _plugins(names),
        "families": [
            {"kind": family.kind, "name": family.name, "missing": missing_modules(family), "install": family.install}
            for family in families
        ],
        "problems": [attrs.asdict(problem) for problem in names.problems()],
    }


def _plugins(names: Registry) -> list[dict[str, Any]]:
    """Every plugin and registry file: where it came from, what it offers by kind, and what is wrong with it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def entry(source: Source) -> dict[str, Any]:
        fresh = {**attrs.asdict(source), "offers": {}, "problems": []}
        return found.setdefault((source.distribution, source.origin), fresh)

    for source in names.plugins.sources.values():
        entry(source)
    for kind, shelf in names.shelves().items():
        for record in shelf.claims():
            entry(record.source)["offers"].setdefault(kind, []).append(record.name)
    for problem in names.problems():
        if problem.distribution != CONFLICT:  # of two plugins that are each in order
            version = _version(problem.distribution)
            unread = Source(problem.distribution, version, problem.entry_point, "entry point")
            entry(unread)["problems"].append(problem.message)
    return list(found.values())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print(report: dict[str, Any]) -> None:
    print_table(("versions", ""), report["versions"].items())
    if report["environment"]:
        typer.echo()
        print_table(("environment", ""), report["environment"].items())
    typer.echo()
    rows = [(p["distribution"], p["version"], p["origin"], p["level"], _offers(p)) for p in report["plugins"]]
    print_table(("plugin", "version", "from", "rank", "offers"), rows)
    typer.echo()
    families = [(f["kind"], f["name"], _advice(f)) for f in report["families"]]
    print_table(("family", "", "status"), families)
    typer.echo()
    if not report["problems"]:
        typer.echo("No problems.")
    for problem in report["problems"]:
        typer.echo(f"problem: {problem['distribution']} ({problem['entry_point']}): {problem['message']}")


def _offers(plugin: dict[str, Any]) -> str:
    plural = {"backbone family": "backbone families", "reward family": "reward families"}
    kinds = [f"{plural.get(kind, f'{kind}s')}: {', '.join(names)}" for kind, names in plugin["offers"].items()]
    failed = len(plugin["problems"])
    return "; ".join([*kinds, *([f"{failed} problem{'s' * (failed > 1)}, see below"] if failed else [])])


def _advice(family: dict[str, Any]) -> str:
    if not family["missing"]:
        return "ready"
    install = family["install"] or " ".join(family["missing"])
    return f"needs {', '.join(family['missing'])}: pip install '{install}'"
