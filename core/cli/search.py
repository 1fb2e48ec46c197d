"""``stitchvm search``: where to cut a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import BackboneName, Blocks, Cuts, Images, RewardNames, Taps, names, numbers, warn_skipped
from .output import Json, print_json, print_table

_SHOWN = 10


def command(
    backbone: BackboneName,
    reward: RewardNames,
    images: Images,
    probes: Annotated[int, typer.Option(help="Images to judge every pair of cuts on.")] = 200,
    criterion: Annotated[str, typer.Option(help="functional, unexplained or mse.")] = "functional",
    cuts: Cuts = None,
    blocks: Blocks = "1-4",
    taps: Taps = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write search.json and heat maps here.")] = None,
    as_json: Json = False,
) -> None:
    """Judge every place to cut a backbone and a reward, without training; of several rewards, for a common head."""
    from .. import plots
    from ..files import make_folder
    from ..images import open_images
    from ..stitching.searching import search_jointly

    folder = None if out is None else make_folder(out)
    source = open_images(images, probes)
    result = search_jointly(
        backbone, names(reward, "REWARD"), images=source, probes=probes, criterion=criterion,  # type: ignore[arg-type]
        cuts=None if cuts is None else numbers(cuts, "--cuts"), blocks=numbers(blocks, "--blocks"), seed=seed,
        taps=() if taps is None else numbers(taps, "--taps"),
    )  # fmt: skip
    warn_skipped(source)
    report = result.report()
    if folder is not None:
        result.save(folder / "search.json")
        for name, found in result.results.items():
            suffix = f"-{name}" if len(result.results) > 1 else ""
            plots.interface_heatmap(found.report(), folder / f"interface{suffix}.png")
    if as_json:
        print_json(report)
        return
    for each in report.get("rewards", [report]):
        _print(each)
    if "rewards" in report:
        _print_common(report)
    if folder is not None:
        typer.echo(f"Written to {folder}.")


def _print(report: dict[str, Any]) -> None:
    from ..plots import place
    from ..stitching.search_result import CRITERIA

    chosen = report["criterion"]
    ranked = sorted(report["grid"], key=lambda cell: cell[chosen])[:_SHOWN]
    columns = (chosen, *(name for name in CRITERIA if name != chosen))
    rows = [(str(cell["i"]), str(cell["j"]), *(f"{cell[name]:.4g}" for name in columns)) for cell in ranked]
    print_table(("cut i", "block j", *columns), rows)
    best = report["best"]
    left = f" ({len(report['grid'])} pairs, the best {len(rows)} shown)" if len(report["grid"]) > len(rows) else ""
    typer.echo(
        f"Best for {report['reward']} on {report['probes']} images: {place(best['i'])}, before reward block "
        f"{best['j']}{left}."
    )


def _print_common(report: dict[str, Any]) -> None:
    from ..plots import place

    blocks = ", ".join(f"{j} of {name}" for name, j in report["best"]["j"].items())
    typer.echo(f"Best for all with one head: {place(report['best']['i'])}, before block {blocks}.")
