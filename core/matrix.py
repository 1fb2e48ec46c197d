"""Every backbone with every reward of a small trained world, stitched for real and beside VAE stitching.

A *world* is a dataset and the backbones and rewards that came with it, in one distribution. Each pair is a *cell*: a
search, a finetune, the baseline by the same recipe, and the reward's own metric of both by noise level. A finished cell
is a file, so that a run can be interrupted, repeated, or shared between processes that take different backbones.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from .backbone import Backbone
from .costs import Clock, CostMeter
from .errors import ConfigError, StitchError
from .evaluation import SIGMAS
from .examples import cache_key
from .files import make_folder, read_json, write_json, write_text
from .finetune import FinetuneSettings
from .images import ImageSource, open_images
from .loading import load_backbone, load_dataset_plugin, load_reward
from .matrix_report import assemble, cell_name, write_matrix
from .metrics import metric_of
from .progress import track
from .provenance import network_identity, versions
from .recipes import recipe as named_recipe
from .records import MetricKind, Record
from .registries import registry
from .reward import Reward
from .searching import search
from .skills import Skill, SkillData
from .stitching import VAE_STITCHING, stitch
from .value import StitchedValue

positive: Any = attrs.validators.gt(0)

PAIRS = 3
"""Held-out pairs for every held-out image: an answer about a pair is one bit, and 1,000 of them leave a standard error
of 1.4 points."""

MADE = "made.json"
"""Beside a cell's value models: what they were made with, so that only the metric is done again where that changes."""


@attrs.frozen
class Scale:
    """How much of everything a cell takes; the defaults are for a small world on two cores.

    ``images`` and ``samples`` (where the recipe takes generated ones) feed the ``steps`` of stage 2, ``probes`` the
    search, ``held_out`` images the metric, or :data:`PAIRS` times as many pairs.
    """

    images: int = attrs.field(default=4096, validator=positive)
    steps: int = attrs.field(default=200, validator=positive)
    probes: int = attrs.field(default=200, validator=positive)
    samples: int = attrs.field(default=2048, validator=positive)
    held_out: int = attrs.field(default=1000, validator=positive)


@attrs.frozen
class World:
    """A dataset's name, and the backbones and rewards that came in its distribution."""

    name: str
    backbones: tuple[str, ...]
    rewards: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> World:
        """The world around a registered dataset.

        Raises ``UnknownNameError`` for a dataset nobody offers, :class:`ConfigError` for one that came alone.
        """
        names = registry()
        home = _distribution(names.dataset(name))
        pairs = [
            (backbone, reward)
            for backbone, reward in names.pairs()
            if _distribution(names.backbone(backbone)) == _distribution(names.reward(reward)) == home
        ]
        if not pairs:
            raise ConfigError(f"{home!r}, which offers the dataset {name!r}, has no backbone and reward to stitch.")
        backbones, rewards = (tuple(dict.fromkeys(column)) for column in zip(*pairs, strict=True))
        return cls(name, backbones, rewards)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every backbone with every reward, backbone by backbone."""
        return [(backbone, reward) for backbone in self.backbones for reward in self.rewards]

    def chosen(self, backbones: Sequence[str] | None, rewards: Sequence[str] | None) -> list[tuple[str, str]]:
        """The pairs of these backbones and rewards, by default of all; :class:`ConfigError` for a foreign name."""
        for asked, there in ((backbones, self.backbones), (rewards, self.rewards)):
            if foreign := sorted(set(asked or ()) - set(there)):
                raise ConfigError(
                    f"{', '.join(foreign)} is not of the world {self.name!r}, which has {', '.join(there)}."
                )
        return [
            (backbone, reward)
            for backbone, reward in self.pairs
            if (backbones is None or backbone in backbones) and (rewards is None or reward in rewards)
        ]


def _distribution(record: Record) -> str | None:
    return record.source.distribution if record.source is not None else None


def run_matrix(
    world: str,
    out: str | Path,
    *,
    backbones: Sequence[str] | None = None,
    rewards: Sequence[str] | None = None,
    scale: Scale | None = None,
    recipe: FinetuneSettings | None = None,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Do every cell that is not done, and return what ``matrix.json`` holds.

    ``recipe`` (default: ``quick``) is taken with the ``scale``'s steps and ``seed``. ``backbones`` and ``rewards``
    restrict what is done; the matrix shows every cell in ``out`` with these settings, and
    is ``partial`` while any of the world's is missing. Writes ``cells/BACKBONE--REWARD.json``, value models to
    ``models/``, and after every cell ``matrix.csv``, ``matrix.json`` and ``matrix.png``. A cell that fails is listed
    under ``failed``, its traceback lies beside the cells, and the others go on.

    Raises ``UnknownNameError``, :class:`ConfigError`, ``OutputError`` or ``ArtefactError`` (a damaged cell) before or
    between cells.
    """
    place = World.of(world)
    pairs = place.chosen(backbones, rewards)
    scale = scale or Scale()
    settings = attrs.evolve(recipe or named_recipe("quick"), steps=scale.steps, seed=seed)
    folder = make_folder(out)
    job = _Job(folder, place, scale, settings, tuple(sigmas), seed, progress)
    failed: dict[tuple[str, str], str] = {}
    report: dict[str, Any] = {}
    for backbone, reward in track(pairs, "matrix", len(pairs), progress):
        if (error := job.attempt(backbone, reward)) is not None:
            failed[backbone, reward] = error
        report = assemble(place.name, place.pairs, folder / "cells", job.shared(), failed)
        write_matrix(report, folder)
    return report


@attrs.define(eq=False)
class _Job:
    """What the cells share; the last backbone and pictures stay loaded for the next cell."""

    folder: Path
    world: World
    scale: Scale
    recipe: FinetuneSettings
    sigmas: tuple[float, ...]
    seed: int
    progress: bool
    _dataset: Any = None
    _backbone: tuple[str, Backbone] | None = None
    _drawn: dict[tuple[MetricKind, str], SkillData] = attrs.field(factory=dict)

    def attempt(self, backbone: str, reward: str) -> str | None:
        """Do a cell unless it is done; what went wrong in one line, or None."""
        note = self.folder / "cells" / f"{cell_name(backbone, reward)}.error.txt"
        try:
            make_folder(note.parent)
            self._do(backbone, reward)
        except Exception as error:  # whatever it is, the other cells are not to be lost
            write_text(note, traceback.format_exc())
            return str(error) if isinstance(error, StitchError) else f"{type(error).__name__}: {error} (see {note})"
        note.unlink(missing_ok=True)
        return None

    def shared(self) -> dict[str, Any]:
        """The settings that all cells of a matrix have in common."""
        recipe = attrs.asdict(self.recipe)
        recipe.pop("checkpoint_every")
        content = {"world": self.world.name, "scale": attrs.asdict(self.scale), "recipe": recipe,
                   "sigma": list(self.sigmas), "seed": self.seed}  # fmt: skip
        return dict(json.loads(json.dumps(content)))

    def _do(self, backbone: str, reward: str) -> None:
        path = self.folder / "cells" / f"{cell_name(backbone, reward)}.json"
        network, judge = self._load(backbone), load_reward(reward)
        models = {"backbone": network_identity(network), "reward": network_identity(judge)}
        settings = {"shared": self.shared(), "models": json.loads(json.dumps(models)), "metric": metric_of(judge)}
        if path.exists() and read_json(path)["settings"] == settings:
            return
        work = self.folder / "work" / f"{cell_name(backbone, reward)}-{cache_key(models)}"
        found = _Cell(self, network, judge, work).run(self.folder / "models" / cell_name(backbone, reward))
        write_json(path, {"backbone": backbone, "reward": reward, **found, "settings": settings,
                          "versions": versions(), "seed": self.seed})  # fmt: skip
        shutil.rmtree(work, ignore_errors=True)  # not there where the models were

    def _load(self, name: str) -> Backbone:
        if self._backbone is None or self._backbone[0] != name:
            self._backbone = None  # let go of the last one before the next is read
            self._backbone = (name, load_backbone(name))
        return self._backbone[1]

    @property
    def dataset(self) -> Any:
        if self._dataset is None:
            self._dataset = load_dataset_plugin(self.world.name)()
        return self._dataset

    def data(self, metric: MetricKind, split: str) -> SkillData:
        """Pictures of a metric's kind: as many in all as stage 2 takes, or the held-out ones."""
        sets = 2 if metric == "preference" else 1
        held_out = self.scale.held_out * (PAIRS if metric == "preference" else 1)
        count = held_out if split == "test" else -(-self.scale.images // sets)
        if (metric, split) not in self._drawn:
            self._drawn[metric, split] = SkillData.draw(metric, self.dataset, count, self.seed, split)
        return self._drawn[metric, split]


@attrs.frozen(eq=False)
class _Cell:
    """One pair's work; ``work`` holds the caches that the stitched model and the baseline share."""

    job: _Job
    backbone: Backbone
    reward: Reward
    work: Path

    def run(self, models: Path) -> dict[str, Any]:
        """The cell's content; the value models are written to ``models``, unless they are there."""
        job, clock, metric = self.job, Clock(), metric_of(self.reward)
        with clock("data"):
            held = job.data(metric, "test")  # first: a dataset without it shall not cost a finetune
        made, values = self._made(models, metric)
        with clock("evaluate"), CostMeter() as evaluating:
            skill: Skill = held.measure(
                self.backbone, self.reward, values, sigmas=job.sigmas, seed=job.seed, progress=job.progress
            )
        cost = {**made["cost"], "evaluate": evaluating.report()}
        seconds = {**made["seconds"], **clock.report()}
        seconds["total"] = round(sum(spent for step, spent in seconds.items() if step != "total"), 1)
        return {**skill.report(), "interface": made["interface"], "seconds": seconds, "cost": cost}

    def _made(self, models: Path, metric: MetricKind) -> tuple[dict[str, Any], dict[str, StitchedValue]]:
        """The stitched value and the baseline, and what they took: found in ``models``, or made and noted there."""
        job, note = self.job, models / MADE
        scale = attrs.asdict(job.scale)
        scale.pop("held_out")
        settings = {"backbone": network_identity(self.backbone), "reward": network_identity(self.reward),
                    "scale": scale, "recipe": job.shared()["recipe"], "seed": job.seed}  # fmt: skip
        settings = json.loads(json.dumps(settings))
        if note.is_file() and (known := read_json(note))["settings"] == settings:
            return known, {
                name: StitchedValue.from_pretrained(models / name, backbone=self.backbone, device=self.backbone.device)
                for name in ("stitched", "vae")
            }
        clock, images = Clock(), open_images(job.data(metric, "train").unlabelled())
        with clock("search"), CostMeter() as searching:
            found = search(
                self.backbone, self.reward, images=images, probes=job.scale.probes, seed=job.seed,
                progress=job.progress,
            )  # fmt: skip
        with clock("stitched"):
            value = self._stitch(images, models / "stitched", {"searched": found})
        with clock("vae"):
            baseline = self._stitch(images, models / "vae", VAE_STITCHING)
        cost = {"search": searching.report(), "stitched": value.provenance.cost, "vae": baseline.provenance.cost}
        made = {"settings": settings, "interface": attrs.asdict(value.interface()), "seconds": clock.report(),
                "cost": cost}  # fmt: skip
        write_json(note, made)
        return made, {"stitched": value, "vae": baseline}

    def _stitch(self, images: ImageSource, out: Path, where: dict[str, Any]) -> StitchedValue:
        """Stage 2, cut ``where`` says."""
        job = self.job
        prompts = None
        if job.recipe.generated > 0:
            each = max(job.scale.samples // job.recipe.seeds_per_prompt, 1)
            prompts = job.dataset.prompts("train", each, job.seed)
        return stitch(
            self.backbone, self.reward, images=images, out=out, work=self.work, recipe=job.recipe, prompts=prompts,
            count=job.scale.images, samples=job.scale.samples, probes=job.scale.probes, seed=job.seed,
            progress=job.progress, **where,
        )  # fmt: skip
