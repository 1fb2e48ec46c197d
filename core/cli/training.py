"""``stitchvm align`` with a method that trains, and ``stitchvm reproduce`` with a table of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from .options import key_values
from .output import print_json, print_table

_BESIDE = {"gain": "after as many updates", "gain_in_its_time": "after no less time"}


def train_and_print(
    method: str, backbone: str, value: Any, source: str, count: int | None, out: Path, as_json: bool,
    training: Sequence[str], watched: int, **settings: Any,
) -> None:  # fmt: skip
    """Train on a dataset's training prompts, or on those of a file, and say what became of the rewards of ``watched``
    prompts: held-out ones of a dataset, the first of a file."""
    from accelerate import PartialState

    from ..prompts import judges_of_prompts, open_prompts
    from ..registries import registry
    from ..training.run import train
    from ..training.state import BEST

    prompts = open_prompts(source, count, split="train")
    of_dataset = source in registry().datasets
    evaluated = open_prompts(source, watched, split="test") if of_dataset else prompts[:watched]
    plan = key_values(training, "--train", "updates=200")
    record = train(
        method, backbone, value, prompts, out=out, training=plan, evaluation_prompts=evaluated,
        judges=judges_of_prompts(source), **settings,
    ).record  # fmt: skip
    if not PartialState().is_main_process:  # one of several says it
        return
    if as_json:
        print_json({
            "settings": record.settings, "evaluations": record.evaluations, "best_update": record.best["update"],
            "cost": record.cost(),
        })  # fmt: skip
        return
    first, best, last = record.evaluations[0], record.best, record.evaluations[-1]
    columns: dict[str, Mapping[str, Any]] = {"before": first, f"after {record.updates} updates": last}
    if best is not last:
        columns[f"best, after {best['update']} (in {BEST})"] = best
    rows = [("rewards", name) for name in last["rewards"]]
    rows[1:1] = [("parts", name) for name in last.get("parts", {})]
    print_table(("reward", *columns), [
        (name if kind == "rewards" else f"  of it, {name}", *(_mean(entry, kind, name) for entry in columns.values()))
        for kind, name in rows
    ])  # fmt: skip
    print_table((method, str(out)), [(name.replace("_", " "), str(entry)) for name, entry in record.cost().items()])


def _mean(entry: Mapping[str, Any], kind: str, name: str) -> str:
    """Of an evaluation; those of before parts were evaluated have none."""
    found = entry.get(kind, {}).get(name, {})
    if found.get("mean") is None:
        return "no finite score" if found else ""
    return f"{found['mean']:.4g}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.2g}")


def train_and_compare(
    table: str, world: str, out: Path, settings: Sequence[str], as_json: bool, **options: Any
) -> None:
    """Do a table's trainings and show what became of the rewards; exits with 1 when one failed."""
    from ..reproduction.training_rows import TrainingScale
    from ..reproduction.training_tables import reproduce_training
    from ..structuring import structure

    scale = structure(TrainingScale, key_values(settings, "--set", "updates=200"), "settings of the training")
    report = reproduce_training(table, world, out, scale=scale, **options)
    if as_json:
        print_json(report)
    elif report["rows"]:
        rewards = list(report["rows"][0]["after"])
        print_table(("backbone", "training", "seeds", "seconds", *rewards, "time to match"), [
            (row["backbone"], row["label"], str(len(row["seeds"])), f"{row['seconds']['mean']:.0f}",
             *(_change(row, name) for name in rewards), _shares(row["time_to_match"]))
            for row in report["rows"]
        ])  # fmt: skip
        paired = [row for row in report["rows"] if row["gain"]]
        if paired:
            print_table(("backbone", "training", "above the plain one", *rewards), [
                (row["backbone"], row["label"], beside, *(_signed(row[gain][name]) for name in rewards))
                for row in paired for gain, beside in _BESIDE.items()
            ])  # fmt: skip
        done = "Partial. Written" if report["partial"] else "Written"
        typer.echo(f"{done} to {out}: {table}.csv, {table}.json, {table}.png.")
    for name, error in report["failed"].items():
        typer.echo(f"failed: {name}: {' '.join(error.split())}", err=True)
    if report["failed"]:
        raise typer.Exit(1)


def _change(row: dict[str, Any], name: str) -> str:
    after = row["after"][name]
    error = "" if after["stderr"] is None else f" ± {after['stderr']:.2g}"
    return " to ".join(_number(mean) for mean in (row["before"][name], after["mean"])) + error


def _number(mean: float | None) -> str:
    return "no finite score" if mean is None else f"{mean:.4g}"


def _signed(gain: dict[str, float | None]) -> str:
    if gain["mean"] is None or gain["stderr"] is None:
        return _number(gain["mean"])
    return f"{gain['mean']:+.4f} ± {gain['stderr']:.4f}"


def _shares(found: list[float | None] | None) -> str:
    return "" if found is None else ", ".join("never" if share is None else f"{share:.0%}" for share in found)
