"""The paper's tables of inference-time alignment (paper, section 5), run on a small trained world.

Every row is one run of :func:`~stitchvm.core.align` in a folder of its own, judged by every reward of the world and by
its detector, and kept as a *cell*: a run can be interrupted, repeated, shared by tables that have rows in common, or by
processes that take different backbones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..alignment.given import reward_condition
from ..alignment.result import AlignResult
from ..alignment.run import align
from ..backbone import Backbone
from ..datasets import judges_of
from ..errors import ConfigError
from ..files import cache_key, make_folder, write_json
from ..latent_space import misfit
from ..loading import load_backbone, load_dataset_plugin, load_reward
from ..metrics import metric_of
from ..progress import track
from ..provenance import network_identity, versions, weights_digest
from ..reward import Reward
from ..sampling import chosen_guidance
from ..stitching.examples import GenerationSettings
from ..stitching.finetune_settings import FinetuneSettings
from ..stitching.recipes import recipe as named_recipe
from ..value import StitchedValue
from .alignment_rows import PLAIN, Pair, Row, Settings, Table, check_rows, table_of
from .cells import attempt, publish, read_cell
from .report import Expected, assemble, write_report
from .values import ValueModels, equivalents, pass_costs
from .world_values import WorldStitcher
from .worlds import Scale, World


def reproduce(
    table: str,
    world: str,
    out: str | Path,
    *,
    backbones: Sequence[str] | None = None,
    rewards: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    settings: Settings | None = None,
    values: str | Path | None = None,
    scale: Scale | None = None,
    recipe: FinetuneSettings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Do every row of ``table`` (``table1``, ``table2``, ``fig3``, ``table6``) that is not done, for every backbone and
    reward of ``world``, and return what ``TABLE.json`` holds.

    ``values`` is a folder of value models as ``matrix`` writes them; what is not there is stitched with ``recipe``
    (default: ``quick``, with the ``scale``'s steps and the seed) and kept in ``models/``. ``backbones`` and ``rewards``
    restrict what is done and whose value models steer, ``rows`` the rows by name (and the plain one, which gains are
    paired with); the table shows every cell in ``out`` with these settings, and is ``partial`` while any is missing.
    Writes ``cells/``, ``runs/`` (pictures and all particles) and, after every row, ``TABLE.csv`` and ``TABLE.json``,
    after every pair ``TABLE.png`` too. A row that fails is listed under ``failed``, its traceback lies beside the
    cells, and the others go on; one that makes no sense is listed under ``not_applicable`` with the reason.

    A damaged cell is done again from its run. Raises ``UnknownNameError``, :class:`ConfigError`, ``OutputError`` or
    ``WeightsError`` before or between rows.
    """
    settings = settings or Settings()
    chosen = table_of(table, settings)
    place = World.of(world)
    pairs = place.chosen(backbones, rewards)
    if settings.embedded_guidance is not None:
        _check_embedded({backbone for backbone, _ in pairs}, settings.embedded_guidance)
    given = None if values is None else Path(values).expanduser()
    if given is not None and not given.is_dir():
        raise ConfigError(f"values is {str(given)!r}, which is not a folder; give one with BACKBONE--REWARD folders.")
    folder = make_folder(out)
    scale = scale or Scale()
    learned = attrs.evolve(recipe or named_recipe("quick"), steps=scale.steps, seed=settings.seed)
    dataset = load_dataset_plugin(place.name)()
    # a value is that of one sampler: the plain one of the table
    sampler = GenerationSettings(settings.steps, settings.guidance_scale, settings.seed)
    models = ValueModels(given, folder, WorldStitcher(dataset, scale, learned, settings.seed, progress, sampler))
    judges = {name: load_reward(name) for name in place.rewards}
    job = _Job(folder, place, settings, dataset, judges, models, progress)
    expected = job.expected(chosen)
    sources = {backbone for backbone, _ in pairs}
    named = list(dict.fromkeys(e.row.name for e in expected))
    check_rows(rows or (), table, named)
    asked = named if rows is None else {PLAIN, *rows}
    todo = [e for e in expected
            if e.pair in pairs and (e.row.source or e.backbone) in sources and e.row.name in asked]  # fmt: skip
    failed: dict[Path, str] = {}

    def publish_rows(pictures: bool) -> dict[str, Any]:
        return publish(
            lambda: assemble(table, chosen, place, expected, job.shared(), failed, job.unfit),
            lambda report: write_report(report, folder, pictures=pictures),
        )

    report = publish_rows(pictures=not todo)
    for each, following in zip(track(todo, table, len(todo), progress), [*todo[1:], None], strict=False):
        if (error := attempt(partial(job.do, each), each.path.with_suffix(".error.txt"))) is not None:
            failed[each.path] = error
        report = publish_rows(pictures=following is None or following.pair != each.pair)
    return report


def _check_embedded(backbones: Collection[str], scale: float) -> None:
    """:class:`ConfigError` for a scale out of range, and where no backbone reads one: before any row, which would each
    fail by it or take no notice."""
    readers = [network for network in map(load_backbone, backbones) if network.guidance is not None]
    if not readers:
        raise ConfigError(
            f"embedded_guidance is {scale:g}, but none of {', '.join(sorted(backbones))} reads any; leave it out."
        )
    readers[0].with_embedded_guidance(scale)


@attrs.define(eq=False, slots=False)
class _Job:
    """What the rows share; the last backbone stays loaded for the next row."""

    folder: Path
    world: World
    settings: Settings
    dataset: Any
    loaded: dict[str, Reward]
    values: ValueModels
    progress: bool
    _backbone: tuple[str, Backbone] | None = None
    _units: dict[str, dict[str, float] | None] = attrs.field(factory=dict)

    @cached_property
    def judges(self) -> dict[str, Reward]:
        """The world's rewards that can be read off a prompt's picture."""
        return {name: reward for name, reward in self.loaded.items() if name not in self.unfit}

    @cached_property
    def unfit(self) -> dict[str, str]:
        """The others, and why."""
        found = {}
        for name, reward in self.loaded.items():
            try:
                reward_condition(reward, self.prompts[:1])
            except ConfigError as error:
                found[name] = str(error)
        return found

    @cached_property
    def prompts(self) -> list[str]:
        return list(self.dataset.prompts("test", self.settings.prompts, self.settings.seed))

    def shared(self) -> dict[str, Any]:
        """The settings that all rows have in common and that decide the result."""
        settings, embedded = self.settings, self.settings.embedded_guidance
        return {"world": self.world.name, "prompts": settings.prompts, "steps": settings.steps,
                "guidance_scale": settings.guidance_scale, "seed": settings.seed,
                **({} if embedded is None else {"embedded_guidance": embedded})}  # fmt: skip

    def expected(self, table: Table) -> list[Expected]:
        """Every row of every pair of the world, pair by pair."""
        found = []
        for backbone, reward in self.world.pairs:
            if reward in self.judges:
                others = tuple(name for name in self.world.backbones if name != backbone)
                rows = table.make(self.settings, Pair(metric_of(self.judges[reward]), others))
                found += [Expected(backbone, reward, row, self.cell_path(backbone, reward, row)) for row in rows]
        return found

    def cell_path(self, backbone: str, reward: str, row: Row) -> Path:
        """Where a row's cell is: rows with the same settings share one, whatever table they are in."""
        name = f"{backbone}--{reward}--{row.name}-{cache_key({**self.shared(), 'row': _deciding(row)})}"
        return self.folder / "cells" / f"{name}.json"

    def do(self, each: Expected) -> None:
        """Do a row, unless it is done by the same networks."""
        row, network, judge = each.row, self._load(each.backbone), self.judges[each.reward]
        value, reason = self._value(row, network, judge)
        known = {
            "backbone": network_identity(network), "reward": network_identity(judge),
            "value": None if value is None else weights_digest(value.branches),
        }  # fmt: skip
        known = json.loads(json.dumps(known))
        models = {**known, "judges": {name: weights_digest(one.net) for name, one in self.judges.items()}}
        if (done := read_cell(each.path)) is not None and done["models"] == models:
            return
        cell = {"backbone": each.backbone, "reward": each.reward, "row": _deciding(row), "models": models}
        if reason is not None:
            write_json(each.path, {**cell, "not_applicable": reason})
            return
        networks = cache_key(known)
        run = self.folder / "runs" / f"{each.path.stem}-{networks[:8]}"
        result = self._align(row, network, judge, value, run)
        if networks not in self._units:
            self._units[networks] = pass_costs(network, judge, value)
        write_json(each.path, {
            **cell, **self._measure(result, each.reward), "cost": result.cost,
            "equivalents": equivalents(result.cost, self._units[networks]),
            "run": str(run.relative_to(self.folder)), "settings": self.shared(), "versions": versions(),
        })  # fmt: skip

    def _value(self, row: Row, network: Backbone, judge: Reward) -> tuple[StitchedValue | None, str | None]:
        """The value model of a row that needs one, or why it cannot steer this backbone."""
        if row.value != "stitched":
            return None, None
        if row.source is None:
            return self.values.get(network, judge), None
        source = self._network(row.source)
        if (reason := misfit(source, network)) is not None:  # before a value model is stitched in vain
            return None, reason
        value = self.values.get(source, judge)
        reason = misfit(source, network, prompted=value.prompted)
        return (value, None) if reason is None else (None, reason)

    def _align(self, row: Row, network: Backbone, judge: Reward, value: StitchedValue | None, run: Path) -> AlignResult:
        settings = self.settings
        scale = settings.guidance_scale
        estimator = "tweedie" if value is None else value  # a method that reads no value leaves it alone
        forget_peak()
        return align(
            row.method, network, estimator, self.prompts, reward=judge,
            seed=settings.seed, steps=settings.steps, batch=settings.batch, out=run, progress=self.progress,
            guidance_scale=chosen_guidance(network, scale), **row.settings,
        )  # fmt: skip

    def _measure(self, result: AlignResult, target: str) -> dict[str, Any]:
        """Every reward and the detector's word of every prompt's picture, in the prompts' order."""
        images, prompts = result.images, list(result.prompts)
        scores = {name: judge_images(reward, images, prompts, self.settings.batch) for name, reward in
                  self.judges.items() if name != target}  # fmt: skip
        fulfilled = judges_of(self.dataset).get("detector")
        return {
            "prompts": prompts, "scores": {target: result.rewards.tolist(), **scores},
            "detector": None if fulfilled is None else [bool(yes) for yes in fulfilled(images, prompts)],
        }  # fmt: skip

    def _load(self, name: str) -> Backbone:
        if self._backbone is None or self._backbone[0] != name:
            self._backbone = None  # let go of the last one before the next is read
            self._backbone = (name, self._network(name))
        return self._backbone[1]

    def _network(self, name: str) -> Backbone:
        """At the embedded guidance of the table, where it reads any."""
        network, embedded = load_backbone(name), self.settings.embedded_guidance
        return network if embedded is None or network.guidance is None else network.with_embedded_guidance(embedded)


def _deciding(row: Row) -> dict[str, Any]:
    """What decides a row's result, JSON-able; its label and curve are the table's."""
    kept = {"method": row.method, "value": row.value, "settings": row.settings, "source": row.source}
    return dict(json.loads(json.dumps(kept)))


@torch.no_grad()
def judge_images(reward: Reward, images: Tensor, prompts: Sequence[str], batch: int = 64) -> list[float]:
    """A reward of every finished image ``[P, 3, H, W]`` in [0, 1] of ``prompts``."""
    found: list[float] = []
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        condition = reward_condition(reward, prompts[part]).to(reward.device)
        found += reward.rate(images[part].to(reward.device), condition).float().tolist()
    return found


def forget_peak() -> None:
    """Let the peak that ``peak_memory`` tells begin anew; where the system cannot, it stays the process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark down to what is resident
