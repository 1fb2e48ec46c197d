"""The main job on a small trained pair: search, finetune, evaluate, rank, steer, and a report that shows it all.

Caches and finetuning are kept in ``DIR/work``: a run that was interrupted repeats search and measurements, not those.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from . import plots
from .alignment.run import AlignResult, align
from .backbone import Backbone
from .comparison import mean_stderr, paired_gain
from .costs import Clock
from .datasets import CaptionedDataset
from .diagnosis.ranking import Ranking, rank_seeds
from .estimators import Stitched, Tweedie
from .evaluation import Retrieval, retrieval
from .files import make_folder, write_json
from .images import ImageSource, open_images
from .loading import load_backbone, load_dataset_plugin, load_reward
from .provenance import versions
from .report import write_report
from .reward import Reward
from .stitching.finetune_settings import FinetuneSettings
from .stitching.recipes import recipe
from .stitching.run import VAE_STITCHING, stitch
from .stitching.search_result import SearchResult
from .stitching.searching import search
from .value import StitchedValue

BACKBONE, REWARD, DATASET = "shapes-mmdit", "shapes-clip", "shapes"


@attrs.frozen
class Scale:
    """How much of everything the quickstart does."""

    images: int
    probes: int
    steps: int
    held_out: int = 1000
    prompts: int = 56
    ranked_prompts: int = 16
    ranked_seeds: int = 8
    particles: int = 4
    sampling_steps: int = 28


NORMAL = Scale(images=4096, probes=200, steps=230, ranked_prompts=10, sampling_steps=20)
FAST = Scale(images=512, probes=48, steps=30, prompts=8, ranked_prompts=3, ranked_seeds=4, sampling_steps=12)

FK_STITCHED = {
    "proposals": 2, "strength": 60.0, "ess_threshold": 0.5, "window": (0.5, 0.75), "proposal_window": (0.45, 0.5)
}  # fmt: skip
FK_TWEEDIE = {"strength": 60.0, "ess_threshold": 0.5}


def quickstart(
    out: str | Path,
    *,
    backbone: str = BACKBONE,
    reward: str = REWARD,
    dataset: str = DATASET,
    fast: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the whole job into ``out`` and return what ``quickstart.json`` holds.

    Writes the artefact to ``out/value``, the baseline to ``out/vae``, plots, ``quickstart.json`` and ``report.html``.
    ``fast`` does a smaller finetune and fewer prompts. Raises ``UnknownNameError`` that says what to install when the
    models are not there.
    """
    folder = make_folder(out)
    clock = Clock()
    scale = FAST if fast else NORMAL
    with clock("load"):
        job = Job.load(folder, backbone, reward, dataset, scale, seed, progress)
    with clock("search"):
        found = job.search()
    with clock("finetune"):
        value = job.stitch(found)
    with clock("baseline"):
        baseline = job.stitch(None)
    with clock("retrieval"):
        recalls = job.retrieval({"stitched": value, "vae": baseline})
    with clock("ranking"):
        ranks = job.ranking(value)
    with clock("steering"):
        steered = job.steer(value)
    command = (
        f"stitchvm quickstart --out {shlex.quote(str(out))}"
        + (" --fast" if fast else "")
        + (f" --seed {seed}" if seed else "")
    )
    summary = {
        "pair": {"backbone": backbone, "reward": reward},
        "interface": attrs.asdict(value.interface()),
        "search": found.report(),
        "retrieval": {**recalls.report(), "retention": recalls.retention("stitched")},
        "ranking": ranks.report(),
        "steering": job.compare(steered),
        "seconds": clock.report(),
        "versions": versions(),
        "seed": seed,
        "command": command,
    }
    pictures = job.draw(found, recalls, summary, steered)
    write_json(folder / "quickstart.json", summary)
    write_report(folder, summary, pictures)
    return summary


@attrs.frozen(eq=False)
class Job:
    """What the steps share."""

    folder: Path
    backbone: Backbone
    reward: Reward
    dataset: CaptionedDataset
    images: ImageSource
    test_prompts: list[str]
    scale: Scale
    seed: int
    progress: bool

    @classmethod
    def load(
        cls, folder: Path, backbone: str, reward: str, dataset: str, scale: Scale, seed: int, progress: bool
    ) -> Job:
        network, judge = load_backbone(backbone), load_reward(reward)
        data: CaptionedDataset = load_dataset_plugin(dataset)()
        train = data.captioned("train", scale.images, seed)
        return cls(
            folder, network, judge, data, open_images(train.images),
            data.prompts("test", scale.prompts, seed), scale, seed, progress,
        )  # fmt: skip

    def search(self) -> SearchResult:
        """Stage 1 over every interface."""
        result = search(
            self.backbone, self.reward, images=self.images, probes=self.scale.probes, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip
        result.save(self.folder / "search.json")
        return result

    def recipe(self) -> FinetuneSettings:
        return attrs.evolve(recipe("quick"), steps=self.scale.steps, seed=self.seed)

    def stitch(self, found: SearchResult | None) -> StitchedValue:
        """Stage 2 at the best interface, or VAE stitching by the same recipe where ``found`` is None."""
        baseline = {**VAE_STITCHING, "probes": self.scale.probes}
        where: dict[str, Any] = {"searched": found} if found is not None else baseline
        return stitch(
            self.backbone, self.reward, images=self.images, out=self.folder / ("vae" if found is None else "value"),
            work=self.folder / "work", recipe=self.recipe(), count=self.scale.images, seed=self.seed,
            progress=self.progress, **where,
        )  # fmt: skip

    def retrieval(self, models: dict[str, StitchedValue]) -> Retrieval:
        held = self.dataset.captioned("test", self.scale.held_out, self.seed)
        return retrieval(
            self.backbone, self.reward, models, held.images.float() / 255, held.captions, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip

    def ranking(self, value: StitchedValue) -> Ranking:
        return rank_seeds(
            self.backbone, {"stitched": Stitched(value), "tweedie": Tweedie(self.reward)}, self.reward,
            self.test_prompts[: self.scale.ranked_prompts], seeds=self.scale.ranked_seeds,
            steps=self.scale.sampling_steps, seed=self.seed, progress=self.progress,
        )  # fmt: skip

    def steer(self, value: StitchedValue) -> dict[str, AlignResult]:
        """The same prompts and starting noise under four methods."""
        many = self.scale.particles
        methods: dict[str, tuple[str, Any, dict[str, Any]]] = {
            "base": ("sample", None, {"particles": 1}),
            "best_of_n": ("best-of-n", None, {"particles": many}),
            "fk_tweedie": ("fk-steering", "tweedie", {"particles": many, **FK_TWEEDIE}),
            "fk_stitched": ("fk-steering", value, {"particles": many, **FK_STITCHED}),
        }
        return {
            name: align(
                method, self.backbone, estimator, self.test_prompts, reward=self.reward, seed=self.seed,
                steps=self.scale.sampling_steps, progress=self.progress, **settings,
            )
            for name, (method, estimator, settings) in methods.items()
        }  # fmt: skip

    def compare(self, steered: Mapping[str, AlignResult]) -> dict[str, Any]:
        """Reward, detector, paired gain over the plain sampler and cost of every method."""
        base = steered["base"]
        table: dict[str, Any] = {
            "prompts": len(self.test_prompts),
            "settings": {"particles": self.scale.particles, "steps": self.scale.sampling_steps,
                         "fk_tweedie": FK_TWEEDIE, "fk_stitched": FK_STITCHED},
        }  # fmt: skip
        for name, result in steered.items():
            shown = self.dataset.fulfilled(result.images, self.test_prompts).float()
            table[name] = {
                "reward": mean_stderr(result.rewards).report(),
                "detector": mean_stderr(shown).report(),
                "cost": result.cost,
            }
            if result is not base:
                table[name]["gain"] = paired_gain(result.rewards, base.rewards).report()
        return table

    def draw(
        self, found: SearchResult, recalls: Retrieval, summary: dict[str, Any], steered: Mapping[str, AlignResult]
    ) -> dict[str, Path]:
        """Every picture of the report."""
        where = {
            name: self.folder / f"{name}.png" for name in ("interface", "recall", "ranking", "steering", "samples")
        }
        plots.interface_heatmap(found.report(), where["interface"])
        plots.recall_curve(summary["retrieval"], where["recall"])
        plots.ranking_curve(summary["ranking"], where["ranking"])
        plots.steering_bars(summary["steering"], where["steering"])
        rows: dict[str, Tensor] = {name: result.images[:8] for name, result in steered.items()}
        plots.image_grid(rows, self.test_prompts[:8], where["samples"])
        return where
