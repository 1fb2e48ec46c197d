"""``stitchvm matrix``: every pair of a small trained world, stitched and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import levels, names
from .output import Json, print_json, print_table
from .stitch import read_recipe


def command(
    world: Annotated[
        str, typer.Option(metavar="DATASET", help="A dataset of 'stitchvm list' that models came with, such as shapes.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes; a rerun continues there.")],
    backbones: Annotated[str | None, typer.Option(metavar="LIST", help="Only these (default: the world's).")] = None,
    rewards: Annotated[str | None, typer.Option(metavar="LIST", help="Only these (default: the world's).")] = None,
    images: Annotated[int, typer.Option(min=1, help="Training pictures a pair.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Finetune steps, whatever the recipe.")] = 200,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="paper, full, quick, or a TOML file.")] = "quick",
    held_out: Annotated[
        int, typer.Option(min=1, help="Held-out images to measure on; of pairs three times as many.")
    ] = 1000,
    probes: Annotated[int, typer.Option(min=4, help="Images to judge every pair of cuts on.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Of the backbone's own, where the recipe takes some.")] = 2048,
    sigmas: Annotated[str, typer.Option(metavar="LIST", help="Noise levels.")] = "0.1,0.25,0.5,0.75,0.9",
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
    as_json: Json = False,
) -> None:
    """Stitch every backbone with every reward of a world, beside VAE stitching, and show what each keeps of its skill.

    Each reward is measured by its own metric on noisy latents. A finished pair is not repeated; several runs with
    different --backbones may share DIR. Exits with 1 when a pair failed.
    """
    from ..reproduction.matrix import run_matrix
    from ..reproduction.worlds import Scale

    scale = Scale(images=images, steps=steps, probes=probes, samples=samples, held_out=held_out)
    report = run_matrix(
        world, out, scale=scale, recipe=read_recipe(recipe, {}), sigmas=levels(sigmas, "--sigmas"), seed=seed,
        backbones=None if backbones is None else names(backbones, "--backbones"),
        rewards=None if rewards is None else names(rewards, "--rewards"),
    )  # fmt: skip
    if as_json:
        print_json(report)
    else:
        _print(report, out)
    for cell in report["failed"]:
        message = " ".join(cell["error"].split())
        typer.echo(f"failed: {cell['backbone']} x {cell['reward']}: {message}", err=True)
    if report["failed"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any], out: Path) -> None:
    from ..plots import percent

    if report["cells"]:
        rows = []
        for cell in report["cells"]:
            both = zip(cell["retention"]["stitched"], cell["retention"]["vae"], strict=True)
            shares = (f"{percent(ours)} / {percent(theirs)}" for ours, theirs in both)
            rows.append((cell["backbone"], cell["reward"], f"{cell['metric']} {cell['clean']:.3f}", *shares))
        print_table(("backbone", "reward", "clean", *(f"{level:g}" for level in report["settings"]["sigma"])), rows)
        typer.echo("By noise level: share of the clean reward's metric that is kept, stitched / VAE stitching.")
    if report["partial"]:
        typer.echo(f"Partial: {report['measured']} of {report['pairs']} pairs.")
    typer.echo(f"Written to {out}: matrix.csv, matrix.json" + (", matrix.png." if report["cells"] else "."))
