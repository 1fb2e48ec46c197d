"""Every backbone with every reward of a small trained world, stitched for real and beside VAE stitching.

Each pair is a *cell*: a
search, a finetune, the baseline by the same recipe, and the reward's own metric of both by noise level. A finished cell
is a file, so that a run can be interrupted, repeated, or shared between processes that take different backbones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import attrs

from ..backbone import Backbone
from ..costs import Clock, CostMeter
from ..evaluation import SIGMAS
from ..files import cache_key, make_folder, read_json, write_json
from ..loading import load_backbone, load_dataset_plugin, load_reward
from ..metrics import metric_of
from ..progress import track
from ..provenance import network_identity, versions
from ..records import MetricKind
from ..reward import Reward
from ..skills import Skill, SkillData
from ..stitching.finetune_settings import FinetuneSettings
from ..stitching.recipes import recipe as named_recipe
from ..stitching.run import VAE_STITCHING
from ..stitching.searching import search
from ..value import StitchedValue
from .cells import attempt, publish
from .matrix_report import assemble, write_matrix
from .world_values import WorldStitcher
from .worlds import PAIRS, Scale, World, cell_name


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
    cells, failed = folder / "cells", dict[tuple[str, str], str]()
    report: dict[str, Any] = {}
    for backbone, reward in track(pairs, "matrix", len(pairs), progress):
        note = cells / f"{cell_name(backbone, reward)}.error.txt"
        if (error := attempt(partial(job.do, backbone, reward), note)) is not None:
            failed[backbone, reward] = error
        report = publish(
            lambda: assemble(place.name, place.pairs, cells, job.shared(), failed),
            lambda found: write_matrix(found, folder),
        )
    return report


@attrs.define(eq=False, slots=False)
class _Job:
    """What the cells share; the last backbone and pictures stay loaded for the next cell."""

    folder: Path
    world: World
    scale: Scale
    recipe: FinetuneSettings
    sigmas: tuple[float, ...]
    seed: int
    progress: bool
    _backbone: tuple[str, Backbone] | None = None
    _held_out: dict[MetricKind, SkillData] = attrs.field(factory=dict)

    def shared(self) -> dict[str, Any]:
        """The settings that all cells of a matrix have in common."""
        recipe = attrs.asdict(self.recipe)
        recipe.pop("checkpoint_every")
        content = {"world": self.world.name, "scale": attrs.asdict(self.scale), "recipe": recipe,
                   "sigma": list(self.sigmas), "seed": self.seed}  # fmt: skip
        return dict(json.loads(json.dumps(content)))

    def do(self, backbone: str, reward: str) -> None:
        """Do a cell, unless it is done with the same settings."""
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

    @cached_property
    def stitcher(self) -> WorldStitcher:
        dataset = load_dataset_plugin(self.world.name)()
        return WorldStitcher(dataset, self.scale, self.recipe, self.seed, self.progress)

    def held_out(self, metric: MetricKind) -> SkillData:
        """What a metric is measured on."""
        if metric not in self._held_out:
            count = self.scale.held_out * (PAIRS if metric == "preference" else 1)
            self._held_out[metric] = SkillData.draw(metric, self.stitcher.dataset, count, self.seed, "test")
        return self._held_out[metric]


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
            held = job.held_out(metric)  # first: a dataset without it shall not cost a finetune
        made, values = self._made(models)
        with clock("evaluate"), CostMeter() as evaluating:
            skill: Skill = held.measure(
                self.backbone, self.reward, values, sigmas=job.sigmas, seed=job.seed, progress=job.progress
            )
        cost = {**made["cost"], "evaluate": evaluating.report()}
        seconds = {**made["seconds"], **clock.report()}
        seconds["total"] = round(sum(spent for step, spent in seconds.items() if step != "total"), 1)
        return {**skill.report(), "interface": made["interface"], "seconds": seconds, "cost": cost}

    def _made(self, models: Path) -> tuple[dict[str, Any], dict[str, StitchedValue]]:
        """The stitched value and the baseline, and what they took: found in ``models``, or made and noted there."""
        job, stitcher = self.job, self.job.stitcher
        settings = stitcher.settings(self.backbone, self.reward)
        if (known := stitcher.known(models, settings)) is not None:
            return known, {
                name: StitchedValue.from_pretrained(models / name, backbone=self.backbone, device=self.backbone.device)
                for name in ("stitched", "vae")
            }
        clock, images = Clock(), stitcher.pictures(self.reward)
        with clock("search"), CostMeter() as searching:
            found = search(
                self.backbone, self.reward, images=images, probes=job.scale.probes, seed=job.seed,
                progress=job.progress,
            )  # fmt: skip
        with clock("stitched"):
            value = stitcher.stitch(self.backbone, self.reward, models / "stitched", self.work, searched=found)
        with clock("vae"):
            baseline = stitcher.stitch(self.backbone, self.reward, models / "vae", self.work, **VAE_STITCHING)
        cost = {"search": searching.report(), "stitched": value.provenance.cost, "vae": baseline.provenance.cost}
        made = stitcher.keep(
            models, settings, interface=attrs.asdict(value.interface()), seconds=clock.report(), cost=cost
        )
        return made, {"stitched": value, "vae": baseline}
