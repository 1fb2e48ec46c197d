"""``stitchvm evaluate``: how good a value model is, or what steering gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from ..errors import ConfigError
from .options import EmbeddedGuidance, levels, refuse_given
from .output import Json, print_json, print_table

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..datasets import CaptionedDataset
    from ..value import StitchedValue


_OF_RANKING = ("prompts", "seeds", "steps", "guidance_scale", "embedded_guidance")
_OF_VALUES = ("count", "sigmas", "vae", "ranking", *_OF_RANKING, "reward", "backbone", "seed")


def command(
    context: typer.Context,
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="A value model, or runs of 'stitchvm align', the base first.")
    ],
    data: Annotated[str | None, typer.Option(metavar="DATASET", help="A dataset of 'stitchvm list'.")] = None,
    count: Annotated[int, typer.Option(help="Held-out images or pairs to measure on.")] = 1000,
    sigmas: Annotated[str, typer.Option(metavar="LIST", help="Noise levels.")] = "0.1,0.25,0.5,0.75,0.9",
    vae: Annotated[Path | None, typer.Option(metavar="DIR", help="Another value model to show beside it.")] = None,
    ranking: Annotated[bool, typer.Option("--ranking", help="Also rank seeds of one prompt, beside Tweedie.")] = False,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to rank on.")] = 40,
    seeds: Annotated[int, typer.Option(help="Seeds a prompt to rank.")] = 12,
    steps: Annotated[int, typer.Option(help="Sampling steps of the ranked seeds.")] = 28,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance of the ranked seeds (default: 3, or 1 if distilled).")
    ] = None,
    embedded_guidance: EmbeddedGuidance = None,
    reward: Annotated[str | None, typer.Option(help="Which of a value model's rewards to measure.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Instead of the value model's own.")] = None,
    repetitions: Annotated[
        int, typer.Option(min=1, help="The runs are one comparison made so often with other seeds; pool them.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of data and noise.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write evaluation.json and plots here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a value model by its reward's metric on noisy latents, or compare runs of 'stitchvm align'.

    A run is compared with the first by its reward and, with --data, by the share of captions its pictures fulfil.
    BASE-1 RUN-1 BASE-2 RUN-2 --repetitions 2 compares each run with its own base and pools both.
    """
    from ..files import make_folder, write_json
    from ..run_comparison import ALIGN_REPORT

    target = None if out is None else make_folder(out)
    if not ranking:
        refuse_given(context, _OF_RANKING, "they are of --ranking.")
    if all((folder / ALIGN_REPORT).is_file() for folder in folders):
        refuse_given(context, _OF_VALUES, "runs of align are compared as they are.")
        report = _compare(folders, data, repetitions)
        show = _print_runs if repetitions == 1 else _print_repetitions
    else:
        refuse_given(context, ("repetitions",), "runs of align alone are repeated.")
        if len(folders) > 1:
            raise ConfigError("give one value model, or only folders that 'stitchvm align' wrote (with an align.json).")
        if data is None:
            raise ConfigError("a value model is measured on held-out data; give one of 'stitchvm list' as --data.")
        job = _Job.load(folders[0], data, vae, backbone, levels(sigmas, "--sigmas"), seed)
        report, show = job.measure(count, reward), _print_value
        if ranking:
            report["ranking"] = job.ranking(
                prompts, reward, seeds=seeds, steps=steps, guidance_scale=guidance_scale,
                embedded_guidance=embedded_guidance,
            )  # fmt: skip
        _draw(report, target)
    if target is not None:
        write_json(target / "evaluation.json", report)
    if as_json:
        print_json(report)
    else:
        show(report)


def _compare(folders: Sequence[Path], data: str | None, repetitions: int) -> dict[str, Any]:
    from ..loading import load_dataset_plugin
    from ..run_comparison import compare_repetitions, compare_runs

    fulfilled = None if data is None else load_dataset_plugin(data)().fulfilled
    if repetitions == 1:
        return compare_runs(folders, fulfilled)
    return compare_repetitions(folders, repetitions, fulfilled)


@attrs.frozen(eq=False)
class _Job:
    """A value model with what it is measured on."""

    backbone: Backbone
    models: dict[str, StitchedValue]
    dataset: CaptionedDataset
    sigmas: tuple[float, ...]
    seed: int

    @classmethod
    def load(
        cls, folder: Path, data: str, vae: Path | None, backbone: str | None, sigmas: tuple[float, ...], seed: int
    ) -> _Job:
        from ..artefact import CONFIG
        from ..errors import ArtefactError
        from ..files import read_json
        from ..loading import load_backbone, load_dataset_plugin
        from ..value import StitchedValue

        if not (folder / CONFIG).is_file():
            raise ArtefactError(f"{str(folder)!r} is neither a value model ({CONFIG}) nor a run of align (align.json).")
        dataset = load_dataset_plugin(data)()
        network = load_backbone(backbone or read_json(folder / CONFIG)["backbone"]["name"])
        places = {"stitched": folder, **({} if vae is None else {"vae": vae})}
        models = {
            name: StitchedValue.from_pretrained(place, backbone=network, allow_other_backbone=backbone is not None)
            for name, place in places.items()
        }
        return cls(network, models, dataset, sigmas, seed)

    def measure(self, count: int, reward: str | None = None) -> dict[str, Any]:
        """``skill`` by the reward's own metric; for recall also ``retrieval``, with both directions."""
        from ..evaluation import chosen_reward
        from ..metrics import metric_of
        from ..skills import Skill, SkillData

        judge = chosen_reward(self.models["stitched"], reward)
        held = SkillData.draw(metric_of(judge), self.dataset, count, self.seed)
        options: dict[str, Any] = {"sigmas": self.sigmas, "seed": self.seed}
        if held.metric != "recall":
            return {"skill": held.measure(self.backbone, judge, self.models, **options).report()}
        found = held.retrieval(self.backbone, judge, self.models, **options)
        skill = Skill.of(found, held.prompts)
        retrieval = {**found.report(), "retention": skill.retention("stitched")}
        return {"retrieval": retrieval, "skill": skill.report()}

    def ranking(self, prompts: int, reward: str | None, **sampling: Any) -> dict[str, Any]:
        """Of held-out ``prompts``' seeds, drawn as ``sampling`` tells ``rank_seeds``."""
        from ..diagnosis.ranking import rank_seeds
        from ..estimators import Stitched, Tweedie

        value = self.models["stitched"]
        value = value if reward is None else value.alone(reward)
        whole = value.objective()
        return rank_seeds(
            self.backbone, {"stitched": Stitched(value), "tweedie": Tweedie(whole)}, whole,
            self.dataset.prompts("test", prompts, self.seed), sigmas=self.sigmas, seed=self.seed, **sampling,
        ).report()  # fmt: skip


def _draw(report: Mapping[str, Any], target: Path | None) -> None:
    from .. import plots

    if target is not None:
        if "retrieval" in report:
            plots.recall_curve(report["retrieval"], target / "recall.png")
        else:
            plots.skill_curve(report["skill"], target / "skill.png")
        if "ranking" in report:
            plots.ranking_curve(report["ranking"], target / "ranking.png")


def _print_value(report: dict[str, Any]) -> None:
    from ..plots import SKILLS

    found = report["skill"]
    shown = "{:.1%}".format if found["metric"] in ("recall", "preference") else "{:.3f}".format
    rows = [("clean reward", *(shown(found["clean"]) for _ in found["sigma"]))]
    rows += [(name, *map(shown, found[name])) for name in ("stitched", "vae") if name in found]
    kept = found["retention"]["stitched"]
    rows.append(("retention", *("–" if share is None else f"{share:.1%}" for share in kept)))
    title = "recall@1" if found["metric"] == "recall" else SKILLS[found["metric"]]
    print_table((f"{title} of {found['count']}", *(f"sigma {sigma:g}" for sigma in found["sigma"])), rows)
    if "ranking" not in report:
        return
    typer.echo()
    ranks = report["ranking"]
    names = [name for name in ("stitched", "tweedie") if name in ranks]
    rows = [(name, *(f"{mean:.3f}" for mean in ranks[name]), f"{ranks['cost'][name]['seconds']:.1f}") for name in names]
    print_table(("within-prompt rank", *(f"sigma {sigma:.2f}" for sigma in ranks["sigma"]), "seconds"), rows)


def _print_runs(report: dict[str, Any]) -> None:
    keys = ("reward", "gain", "detector", "detector_gain")
    rows = [
        (run["folder"], run["method"], *(_mean(run.get(key)) for key in keys), f"{run['cost']['seconds']:.0f}")
        for run in report["runs"]
    ]
    print_table(("run", "method", "reward", "gain", "fulfilled", "gain in it", "seconds"), rows)
    typer.echo(f"{report['prompts']} prompts, seed {report['seed']}; gains are paired with the first run.")


def _print_repetitions(report: dict[str, Any]) -> None:
    for repetition in report["repetitions"]:
        _print_runs(repetition)
        typer.echo()
    rows = [
        (run["folder"], run["method"], *(_mean(run.get(key)) for key in ("gain", "detector_gain")), str(run["pairs"]))
        for run in report["pooled"]
    ]
    print_table(("run and its repetitions", "method", "gain", "gain in fulfilled", "pairs"), rows)
    typer.echo("All pairs together; standard errors are clustered by prompt.")


def _mean(entry: Mapping[str, Any] | None) -> str:
    from ..comparison import MeanStderr

    return "" if entry is None else str(MeanStderr(**entry))
