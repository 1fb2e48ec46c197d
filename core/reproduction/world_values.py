"""The value models of a small world's pairs, stitched on its dataset's pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..backbone import Backbone
from ..files import cache_key, read_json, write_json
from ..images import ImageSource, open_images
from ..joint import JointReward, load_rewards
from ..metrics import metric_of
from ..provenance import network_identity
from ..records import MetricKind, name_of
from ..reward import Reward
from ..skills import SkillData
from ..stitching.examples import GenerationSettings
from ..stitching.finetune_settings import FinetuneSettings
from ..stitching.run import stitch
from ..value import StitchedValue
from .worlds import Scale, cell_name

MADE = "made.json"
"""Beside value models: what they were made with, so that they are not made again with the same."""


@attrs.define(eq=False)
class WorldStitcher:
    """Stitches pairs of the world of ``dataset``, all by one ``recipe``, whose samples are drawn by ``generation``; the
    pictures of a metric stay drawn."""

    dataset: Any
    scale: Scale
    recipe: FinetuneSettings
    seed: int
    progress: bool
    generation: GenerationSettings = attrs.field(
        default=attrs.Factory(lambda self: GenerationSettings(seed=self.seed), takes_self=True)
    )
    _drawn: dict[MetricKind, SkillData] = attrs.field(factory=dict)

    def settings(self, backbone: Backbone, reward: Reward | JointReward) -> dict[str, Any]:
        """JSON-able: all that decides a pair's value models."""
        scale, recipe = attrs.asdict(self.scale), attrs.asdict(self.recipe)
        scale.pop("held_out")
        recipe.pop("checkpoint_every")
        judges = [network_identity(one) for one in load_rewards(reward).values()]
        drawn = {"generation": attrs.asdict(self.generation)} if self.recipe.generated > 0 else {}
        content = {"backbone": network_identity(backbone), "reward": judges[0] if len(judges) == 1 else judges,
                   "scale": scale, "recipe": recipe, "seed": self.seed, **drawn}  # fmt: skip
        return dict(json.loads(json.dumps(content)))

    def known(self, place: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The note beside the value models in ``place``, when they were made with these settings."""
        note = place / MADE
        found = dict(read_json(note)) if note.is_file() else {}
        return found if found.get("settings") == settings else None

    def keep(self, place: Path, settings: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Note what the value models in ``place``, all written, were made with."""
        note = {"settings": dict(settings), **facts}
        write_json(place / MADE, note)
        return note

    def pictures(self, reward: Reward | JointReward) -> ImageSource:
        """What stage 2 trains on: the pictures of the reward's metric, captioned ones for several rewards."""
        metric = metric_of(reward) if isinstance(reward, Reward) else "recall"
        if metric not in self._drawn:
            sets = 2 if metric == "preference" else 1
            count = -(-self.scale.images // sets)
            self._drawn[metric] = SkillData.draw(metric, self.dataset, count, self.seed, "train")
        return open_images(self._drawn[metric].unlabelled())

    def stitch(
        self, backbone: Backbone, reward: Reward | JointReward, out: Path, work: Path, **where: Any
    ) -> StitchedValue:
        """Stage 2, cut ``where`` says (by default a search's best); what :func:`~stitchvm.core.stitch` raises."""
        scale, prompts = self.scale, None
        searching: dict[str, Any] = {} if "searched" in where else {"probes": scale.probes}
        if self.recipe.generated > 0:
            prompts = self.dataset.prompts("train", max(scale.samples // self.recipe.seeds_per_prompt, 1), self.seed)
        return stitch(
            backbone, reward, images=self.pictures(reward), out=out, work=work, recipe=self.recipe, prompts=prompts,
            count=scale.images, samples=scale.samples, generation=self.generation, seed=self.seed,
            progress=self.progress, **searching, **where,
        )  # fmt: skip

    def once(self, backbone: Backbone, reward: Reward | JointReward, folder: Path) -> Path:
        """Where the pair's stitched value is under ``folder``: made there, unless it has been with the same settings
        and networks."""
        name = cell_name(name_of(backbone), "+".join(load_rewards(reward)))
        place, settings = folder / "models" / name, self.settings(backbone, reward)
        if self.known(place, settings) is None:
            work = folder / "work" / f"{name}-{cache_key(settings)}"
            self.stitch(backbone, reward, place / "stitched", work)
            self.keep(place, settings)
            shutil.rmtree(work)
        return place / "stitched"
