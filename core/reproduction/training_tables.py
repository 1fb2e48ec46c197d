"""The paper's training-time alignment (paper, section 6), run on a small trained world.

Every row and seed is one :func:`~stitchvm.core.train` in a folder of its own, which goes on where it was interrupted;
tables share the trainings that they have in common.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import attrs

from ..artefact import CONFIG, saved_identity
from ..backbone import Backbone
from ..comparison import mean_stderr
from ..datasets import judges_of
from ..errors import ConfigError
from ..files import cache_key, make_folder, read_json, write_json, write_text
from ..joint import JointReward
from ..loading import load_backbone, load_dataset_plugin, load_reward
from ..lora import LoraSettings
from ..provenance import versions
from ..reward import Reward
from ..stitching.examples import GenerationSettings
from ..stitching.finetune_settings import FinetuneSettings
from ..stitching.recipes import recipe as named_recipe
from ..training.plots import comparison_curves
from ..training.run import train
from ..training.settings import TrainSettings
from ..training.state import RECORD
from ..value import StitchedValue
from .alignment_rows import check_rows
from .cells import attempt, publish
from .training_rows import TRAINING_TABLES, TrainingRow, TrainingScale
from .values import found_in
from .world_values import WorldStitcher
from .worlds import Scale, World, cell_name

PROMPTS = 1024
"""How many of the dataset's training prompts are trained on."""


def reproduce_training(
    table: str,
    world: str,
    out: str | Path,
    *,
    backbones: Sequence[str] | None = None,
    rewards: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    scale: TrainingScale | None = None,
    value: str | Path | None = None,
    stitching: Scale | None = None,
    recipe: FinetuneSettings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Do every training of ``table`` (``table3``, ``fig4``, ``fig5``, ``fig7``, ``fig7-draft``) that is not done, and
    return what ``TABLE.json`` holds.

    The trained reward is the sum of ``rewards`` (default: all of the world that read prompts); what else scores a
    picture alone is held out, and so is the dataset's detector. ``value`` is the folder of a value model of exactly
    those rewards, or holds one of each (``BACKBONE--REWARD``), which are read together; without it one is stitched as
    ``matrix`` does and kept in ``models/``. ``rows`` restricts what is done. Writes
    ``trainings/BACKBONE--ROW--SEED`` and, after every one, ``TABLE.csv``, ``TABLE.json``, ``TABLE.png``. A training
    that fails is listed under ``failed``, the others go on.

    Raises ``UnknownNameError`` and :class:`ConfigError` before the first one.
    """
    if table not in TRAINING_TABLES:
        raise ConfigError(f"unknown table {table!r}; choose one of {', '.join(TRAINING_TABLES)}.")
    scale, place = scale or TrainingScale(), World.of(world)
    title, make, against = TRAINING_TABLES[table]
    chosen = make(scale)
    check_rows(rows or (), table, [row.name for row in chosen])
    names = list(dict.fromkeys(backbone for backbone, _ in place.chosen(backbones, rewards)))
    learned = attrs.evolve(recipe or named_recipe("quick"), steps=(stitching or Scale()).steps)
    # a value is that of one sampler: the training's own, which has no classifier-free guidance
    sampler = GenerationSettings(scale.steps, guidance_scale=1.0)
    stitcher = WorldStitcher(load_dataset_plugin(place.name)(), stitching or Scale(), learned, 0, progress, sampler)
    job = _Job(make_folder(out), place, scale, tuple(rewards or ()), value, stitcher)
    failed: dict[str, str] = {}

    def report() -> dict[str, Any]:
        return publish(
            lambda: job.report(table, title, names, chosen, failed), lambda found: _write(found, against, job.folder)
        )

    known = report()
    for backbone, row, seed in product(names, chosen, scale.seeds):
        if (rows is None or row.name in rows) and job.attempt(backbone, row, seed, failed):
            known = report()
    return known


@attrs.define(eq=False, slots=False)
class _Job:
    """What the trainings share; the last backbone and its value model stay loaded."""

    folder: Path
    world: World
    scale: TrainingScale
    asked: tuple[str, ...]
    given: str | Path | None
    stitcher: WorldStitcher
    _last: tuple[str, Backbone, StitchedValue | None] | None = None
    _facts: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    def attempt(self, backbone: str, row: TrainingRow, seed: int, failed: dict[str, str]) -> bool:
        """Train, unless that is done; whether anything was."""
        place = self.place(backbone, row, seed)
        if self._read(backbone, row, seed) is not None:
            return False
        note = self.folder / f"{place.name}.error.txt"
        if (error := attempt(partial(self._train, backbone, row, seed, place), note)) is not None:
            failed[place.name] = error
        return True

    def place(self, backbone: str, row: TrainingRow, seed: int) -> Path:
        """Where a training is: rows of one kind share it, whatever table they are in."""
        shared = {**attrs.asdict(self.scale), "method": row.method, "settings": row.method_settings(self.scale.steps),
                  "training": row.training, "rewards": self.asked}  # fmt: skip
        # what a row reads of these is in its own settings, whose others it is not to be told apart by
        of_rows = ("samples", "levels", "learning_rate", "windows")
        for free in ("seeds", "updates", "batch", *of_rows):
            shared.pop(free)
        if row.stop is not None:
            if backbone not in self._facts:  # reads the weights, and every report asks for every training's place
                self._facts[backbone] = self._value_facts(backbone)
            shared["value"] = self._facts[backbone]
        return self.folder / "trainings" / f"{backbone}--{row.name}--{seed}-{cache_key(shared)[:8]}"

    def _value_facts(self, backbone: str) -> dict[str, Any]:
        """What tells the value model of stopped rows from another: what is given, or how one will be made."""
        folders = self._given_folders(backbone)
        if not folders:
            made = ("scale", "recipe", "generation")
            return {name: attrs.asdict(getattr(self.stitcher, name)) for name in made}
        facts = [saved_identity(folder) for folder in folders]
        return facts[0] if len(facts) == 1 else {"together": facts}

    def _given_folders(self, backbone: str) -> list[Path]:
        """The given value model, or one of each trained reward; :class:`ConfigError` where one is missing."""
        if self.given is None:
            return []
        given = Path(self.given).expanduser()
        if (given / CONFIG).is_file():
            return [given]
        found = {name: found_in(given, backbone, name) for name in self._names}
        if missing := [cell_name(backbone, name) for name, folder in found.items() if folder is None]:
            raise ConfigError(
                f"{str(given)!r} holds neither a value model ({CONFIG}) nor {' nor '.join(missing)}. Give the folder "
                "of one that reads all trained rewards, or one that holds such a folder for each."
            )
        return [folder for folder in found.values() if folder is not None]

    def _train(self, backbone: str, row: TrainingRow, seed: int, place: Path) -> None:
        scale, dataset = self.scale, self.stitcher.dataset
        network = self._load(backbone)
        trained, held_out = self._rewards()
        value = None if row.stop is None else self._value(backbone, trained)
        plan = TrainSettings(
            updates=scale.updates, prompts_per_update=scale.prompts, evaluate_every=scale.evaluate_every,
            checkpoint_every=scale.evaluate_every, batch=scale.batch, lora=LoraSettings(), tracker=None, **row.training,
        )  # fmt: skip
        train(
            row.method, network, value, dataset.prompts("train", PROMPTS, 0), out=place, training=plan,
            seed=seed, steps=scale.steps, reward=trained, held_out_rewards=held_out,
            judges=judges_of(dataset),
            evaluation_prompts=dataset.prompts("test", scale.evaluation_prompts, 0), progress=self.stitcher.progress,
            **row.method_settings(scale.steps),
        )  # fmt: skip

    def _rewards(self) -> tuple[JointReward, list[Any]]:
        """What is trained on, and what else scores a picture without reference images."""
        others = [one for name, one in self._loaded.items() if name not in self._names]
        return JointReward([self._loaded[n] for n in self._names]), [o for o in others if o.condition_kind != "images"]

    @cached_property
    def _loaded(self) -> dict[str, Reward]:
        return {name: load_reward(name) for name in self.world.rewards}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Of the trained rewards."""
        return self.asked or tuple(n for n, one in self._loaded.items() if one.condition_kind == "prompts")

    def _load(self, name: str) -> Backbone:
        if self._last is None or self._last[0] != name:
            self._last = None  # let go of the last one before the next is read
            self._last = (name, load_backbone(name), None)
        return self._last[1]

    def _value(self, backbone: str, trained: JointReward) -> StitchedValue:
        """The value model of the trained rewards, as given or stitched."""
        assert self._last is not None
        name, network, known = self._last
        if known is None:
            folders = self._given_folders(name) or [self.stitcher.once(network, trained, self.folder)]
            each = [StitchedValue.from_pretrained(f, backbone=network, device=network.device) for f in folders]
            known = StitchedValue.together(each)
            if known.names != tuple(trained.rewards):
                expected = ", ".join(trained.rewards)
                raise ConfigError(f"{str(self.given)!r} reads {', '.join(known.names)}, expected {expected}.")
            self._last = (name, network, known)
        return known

    def report(
        self, table: str, title: str, backbones: Sequence[str], rows: Sequence[TrainingRow], failed: Mapping[str, str]
    ) -> dict[str, Any]:
        """What ``TABLE.json`` holds."""
        entries, missing = [], []
        for backbone in backbones:
            done: dict[str, tuple[dict[str, Any], dict[int, dict[str, Any]]]] = {}
            for row in rows:
                found = {seed: self._read(backbone, row, seed) for seed in self.scale.seeds}
                missing += [f"{backbone} {row.name} {seed}" for seed, run in found.items() if run is None]
                runs = {seed: run for seed, run in found.items() if run is not None}
                if runs:
                    done[row.name] = _entry(backbone, row, list(runs.values())), runs
            for entry, runs in done.values():
                plain, beside = done.get(entry["beside"], (None, {}))
                entry["time_to_match"] = _time_to_match(entry, plain) if plain else None
                paired = bool(set(runs) & set(beside))
                entry["gain"] = _gain(runs, beside) if paired else None
                entry["gain_in_its_time"] = _gain(runs, beside, in_its_time=True) if paired else None
                entries.append(entry)
        return {
            "table": table, "title": title, "world": self.world.name, "partial": bool(missing), "missing": missing,
            "failed": dict(failed), "rows": entries, "settings": attrs.asdict(self.scale), "versions": versions(),
        }  # fmt: skip

    def _read(self, backbone: str, row: TrainingRow, seed: int) -> dict[str, Any] | None:
        """The record of a training that is finished; of one that went on, as it was then.

        Raises :class:`ConfigError` where that was not evaluated.
        """
        path, asked = self.place(backbone, row, seed) / RECORD, self.scale.updates
        record = read_json(path) if path.is_file() else None
        if record is None or record["updates"] < asked:
            return None
        if record["updates"] == asked:
            return record
        then = [evaluation for evaluation in record["evaluations"] if evaluation["update"] <= asked]
        if then[-1]["update"] < asked:
            raise ConfigError(
                f"{str(path.parent)!r} has had {record['updates']} updates and was not evaluated after {asked}, but "
                f"after {then[-1]['update']}; ask for as many, or train anew in another folder."
            )
        cost = {**record["cost"], **then[-1]["passes"], "seconds": then[-1]["seconds"]}
        return {**record, "updates": asked, "evaluations": then, "cost": cost}


def _entry(backbone: str, row: TrainingRow, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row: final means by reward over its seeds, the cost, and the curve of every seed."""
    finals = [run["evaluations"][-1]["rewards"] for run in runs]
    curves = [
        {"update": [e["update"] for e in run["evaluations"]], "seconds": [e["seconds"] for e in run["evaluations"]],
         "passes": [e["passes"].get("denoiser", 0) for e in run["evaluations"]],
         **{name: [e["rewards"][name]["mean"] for e in run["evaluations"]] for name in finals[0]}}
        for run in runs
    ]  # fmt: skip
    return {
        "backbone": backbone, "row": row.name, "label": row.label, "beside": row.beside,
        "seeds": [run["seed"] for run in runs],
        "before": {name: runs[0]["evaluations"][0]["rewards"][name]["mean"] for name in finals[0]},
        "after": {name: _mean([final[name]["mean"] for final in finals]) for name in finals[0]},
        "seconds": mean_stderr([run["cost"]["seconds"] for run in runs]).report(),
        "cost": runs[0]["cost"], "trained": next(iter(finals[0])), "curves": curves,
    }  # fmt: skip


def _time_to_match(stopped: Mapping[str, Any], plain: Mapping[str, Any]) -> list[float | None]:
    """For every seed of the stopped trainings, the share of the plain one's time after which it had the plain one's
    final trained reward; None where it never had, or where there is no plain one of that seed."""
    name = plain["trained"]
    found: list[float | None] = []
    plain_curves = dict(zip(plain["seeds"], plain["curves"], strict=True))
    for seed, ours in zip(stopped["seeds"], stopped["curves"], strict=True):
        if (theirs := plain_curves.get(seed)) is None:
            found.append(None)
            continue
        reached = [s for s, mean in zip(ours["seconds"], ours[name], strict=True) if mean >= theirs[name][-1]]
        found.append(reached[0] / theirs["seconds"][-1] if reached else None)
    return found


def _gain(
    stopped: Mapping[int, Mapping[str, Any]], plain: Mapping[int, Mapping[str, Any]], *, in_its_time: bool = False
) -> dict[str, Any]:
    """What the stopped trainings' last samples score above the plain ones', prompt by prompt and from the same noise,
    by reward; ``in_its_time``: above the plain ones' first evaluation after no less time. Prompts are the independent
    units: each one's mean over the seeds that both have counts once."""
    seeds = sorted(set(stopped) & set(plain))
    last = [stopped[seed]["evaluations"][-1] for seed in seeds]
    longest = [end["seconds"] if in_its_time else math.inf for end in last]
    beside = [_evaluation_after(plain[seed], seconds) for seed, seconds in zip(seeds, longest, strict=True)]
    ends = [[evaluation["scores"] for evaluation in of] for of in (last, beside)]
    return {name: _paired(*([end[name] for end in of] for of in ends)) for name in ends[0][0]}


def _paired(
    ours: Sequence[Sequence[float | None]], theirs: Sequence[Sequence[float | None]]
) -> dict[str, float | None]:
    """The mean over prompts of our mean score over seeds less theirs; of the seeds of a prompt, those for which both
    have a score (None: it was not finite)."""
    gains = []
    for prompt in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        pairs = [(a, b) for a, b in zip(*prompt, strict=True) if a is not None and b is not None]
        gains += [sum(a - b for a, b in pairs) / len(pairs)] if pairs else []
    return _mean(gains)


def _mean(values: Sequence[float | None]) -> dict[str, float | None]:
    """Over what there is; None of nothing."""
    known = [value for value in values if value is not None]
    return mean_stderr(known).report() if known else {"mean": None, "stderr": None}


def _evaluation_after(run: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
    """The first evaluation after at least that time, or the last."""
    evaluations = run["evaluations"]
    return dict(next((one for one in evaluations if one["seconds"] >= seconds), evaluations[-1]))


def _write(report: Mapping[str, Any], against: str, folder: Path) -> None:
    name, text = report["table"], io.StringIO()
    rewards = list(report["rows"][0]["after"]) if report["rows"] else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "row", "seed", "update", "seconds", "denoiser_passes", *rewards])
    for row in report["rows"]:
        for seed, curve in zip(row["seeds"], row["curves"], strict=True):
            for k, seconds in enumerate(curve["seconds"]):
                means = [curve[reward][k] for reward in rewards]
                where = [row["backbone"], row["row"], seed, curve["update"][k]]
                writer.writerow([*where, seconds, curve["passes"][k], *means])
    write_text(folder / f"{name}.csv", text.getvalue())
    write_json(folder / f"{name}.json", report)
    if report["rows"]:
        comparison_curves(report, against, folder / f"{name}.png")
