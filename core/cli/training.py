"""``stitchvm align`` with a method that trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .output import print_json, print_table

EVALUATED = 16
"""Held-out prompts that are sampled on the way, where the prompts come from a dataset."""


def train_and_print(
    method: str, backbone: str, value: Any, source: str, count: int | None, out: Path, as_json: bool,
    training: Sequence[str], **settings: Any,
) -> None:  # fmt: skip
    """Train on a dataset's training prompts, or on those of a file, and say what became of the rewards."""
    from ..loading import load_dataset_plugin
    from ..prompts import open_prompts
    from ..registries import registry
    from ..training import TrainSettings, train

    prompts = open_prompts(source, count, split="train")
    watched, judges = None, {}
    if source in registry().datasets:
        watched = open_prompts(source, EVALUATED, split="test")
        fulfilled = getattr(load_dataset_plugin(source)(), "fulfilled", None)
        judges = {} if fulfilled is None else {"detector": fulfilled}
    plan = training_settings(TrainSettings, training)
    record = train(
        method, backbone, value, prompts, out=out, training=plan, evaluation_prompts=watched, judges=judges, **settings
    ).record
    if as_json:
        print_json({"settings": record.settings, "evaluations": record.evaluations, "cost": record.cost()})
        return
    first, last = record.evaluations[0]["rewards"], record.evaluations[-1]["rewards"]
    shown = [(name, f"{first[name]['mean']:.4g}", f"{last[name]['mean']:.4g} ± {last[name]['stderr'] or 0:.2g}")
             for name in last]  # fmt: skip
    print_table(("reward", "before", f"after {record.updates} updates"), shown)
    print_table((method, str(out)), [(name.replace("_", " "), str(entry)) for name, entry in record.cost().items()])


def training_settings(cls: type[Any], pairs: Sequence[str]) -> Any:
    """``["updates=200", "lora={\"rank\": 8}"]`` as :class:`~stitchvm.core.TrainSettings`: JSON where it is some, else a
    string.

    Raises :class:`ConfigError` for an entry without ``=``, an unknown key, or a value out of range.
    """
    from ..structuring import structure

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--train is {pair!r}; write KEY=VALUE, such as updates=200.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return structure(cls, found, "settings of the training")
