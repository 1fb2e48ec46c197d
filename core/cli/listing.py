"""``stitchvm list``: the names there are."""

from __future__ import annotations

from typing import Annotated, Any

import attrs
import typer

from ..loading import missing_modules
from ..records import AlignerRecord, BackboneRecord, DatasetRecord, Family, Record, RewardRecord
from ..registries import Registry, registry
from .output import Json, print_json, print_table

_KINDS = {BackboneRecord: "backbone", RewardRecord: "reward", AlignerRecord: "aligner", DatasetRecord: "dataset"}


def command(
    pattern: Annotated[str, typer.Argument(help="Only names that match, for example 'sd3*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List backbones, rewards, aligners and datasets."""
    names = registry()
    records = names.list(pattern)
    if as_json:
        print_json([_entry(record, names) for record in records])
        return
    if records:
        rows = [_row(record, names) for record in records]
        print_table(("kind", "name", "family", "licence", "from", "status"), rows)
    else:
        typer.echo(f"No name matches {pattern!r}.", err=True)
    problems = len(names.problems())
    if problems:
        typer.echo(f"{problems} problem{'s' * (problems > 1)}: see 'stitchvm doctor'.", err=True)


def _family(record: Record, names: Registry) -> Family | AlignerRecord | None:
    """What says which modules a record needs; None where nothing does."""
    if isinstance(record, DatasetRecord):
        return None
    if isinstance(record, AlignerRecord):
        return record
    shelf = names.backbone_families if isinstance(record, BackboneRecord) else names.reward_families
    return shelf.get(record.family)


def _status(record: Record, names: Registry) -> str:
    code = _family(record, names)
    if code is None:
        return "ready" if isinstance(record, DatasetRecord) else "no such family"
    if not missing_modules(code):
        return "ready"
    return f"pip install '{code.install}'" if code.install else f"needs {', '.join(missing_modules(code))}"


def _entry(record: Record, names: Registry) -> dict[str, Any]:
    return {"kind": _KINDS[type(record)], "status": _status(record, names), **attrs.asdict(record)}


def _row(record: Record, names: Registry) -> tuple[str, ...]:
    licence = getattr(record, "licence", "") + (" (gated)" if getattr(record, "gated", False) else "")
    source = record.source.distribution if record.source else ""
    family = getattr(record, "family", "")
    return _KINDS[type(record)], record.name, family, licence, source, _status(record, names)
