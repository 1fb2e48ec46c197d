"""``stitchvm reproduce``: the paper's tables of inference-time alignment on a small trained world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .align import method_settings
from .options import EmbeddedGuidance, names, reals, refuse_given
from .output import Json, print_json, print_table
from .stitch import read_recipe
from .training import train_and_compare

_OF_SAMPLING = (
    "prompts", "steps", "guidance_scale", "embedded_guidance", "seed", "batch", "particles", "proposals", "strength",
    "strengths_tweedie", "strengths_stitched", "normaliser", "methods",
)  # fmt: skip
_OF_REWARD = "(default: by the reward's scale)"


def command(
    context: typer.Context,
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="table1 (gradients), table2 (particles), fig3 (cost), table6 (transfer); "
            "of training table3, fig4, fig5, fig7, fig7-draft.",
        ),
    ],
    world: Annotated[
        str, typer.Option(metavar="DATASET", help="A dataset of 'stitchvm list' that models came with, such as shapes.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes; a rerun continues there.")],
    values: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Value models, as matrix writes them; missing ones are stitched.")
    ] = None,
    backbones: Annotated[str | None, typer.Option(metavar="LIST", help="Only these (default: the world's).")] = None,
    rewards: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Only these (default: the world's; to train: those that read prompts)."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none (default: 3, or 1 if distilled).")
    ] = None,
    embedded_guidance: EmbeddedGuidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples in memory at a time; changes nothing else.")] = 64,
    particles: Annotated[int, typer.Option(min=1, help="Of the particle methods (fig3 has its own).")] = 4,
    proposals: Annotated[int, typer.Option(min=1, help="A particle, where there are any (fig3 has its own).")] = 2,
    strength: Annotated[float | None, typer.Option(help=f"Of the particle methods {_OF_REWARD}.")] = None,
    strengths_tweedie: Annotated[
        str | None, typer.Option(metavar="LIST", help=f"Gradient guidance by Tweedie {_OF_REWARD}.")
    ] = None,
    strengths_stitched: Annotated[
        str | None, typer.Option(metavar="LIST", help=f"Gradient guidance by a value model {_OF_REWARD}.")
    ] = None,
    normaliser: Annotated[str, typer.Option(help="Of the gradient: raw, norm, unit-rms, rms-ratio, epsilon.")] = "raw",
    methods: Annotated[
        str | None, typer.Option(metavar="LIST", help="Further rows: svdd,das of table2, dps of table6.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="LIST", help="Only these, as named in the CSV, such as fk-stitched-n4-m2,nft.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of dps (table1) or fk-steering; of training: updates, samples, seeds ..; may be repeated.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training pictures of a missing value model.")] = 4096,
    finetune_steps: Annotated[int, typer.Option(min=1, help="Its finetune steps, whatever the recipe.")] = 200,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Its recipe: paper, full, quick, or TOML.")
    ] = "quick",
    probes: Annotated[int, typer.Option(min=4, help="Images of its search.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Of the backbone's own, where the recipe takes some.")] = 2048,
    as_json: Json = False,
) -> None:
    """Steer every backbone of a world by every reward, as a table of the paper does, and judge the pictures by all.

    Gains are paired with the plain sampler's, prompt by prompt. A finished row is not repeated; tables, and runs with
    different --backbones, may share DIR. Exits with 1 when a row failed.
    """
    from ..reproduction.training_rows import TRAINING_TABLES
    from ..reproduction.worlds import Scale

    scale = Scale(images=images, steps=finetune_steps, probes=probes, samples=samples)
    chosen: dict[str, Any] = {
        "backbones": None if backbones is None else names(backbones, "--backbones"),
        "rewards": None if rewards is None else names(rewards, "--rewards"),
        "rows": None if rows is None else names(rows, "--rows"),
    }
    if table in TRAINING_TABLES:
        refuse_given(context, _OF_SAMPLING, f"{table} trains; --set gives its settings (updates=100), --rows its rows.")
        train_and_compare(
            table, world, out, options or (), as_json, stitching=scale, value=values,
            recipe=read_recipe(recipe, {}), **chosen,
        )  # fmt: skip
        return
    from ..reproduction.alignment_rows import TABLES, Settings, table_of
    from ..reproduction.alignment_tables import reproduce

    if table not in TABLES:
        raise ConfigError(f"unknown table {table!r}; choose one of {', '.join((*TABLES, *TRAINING_TABLES))}.")
    settings = Settings(
        prompts=prompts, steps=steps, guidance_scale=guidance_scale, embedded_guidance=embedded_guidance, seed=seed,
        batch=batch, particles=particles, proposals=proposals, strength=strength, normaliser=normaliser,
        strengths_tweedie=None if strengths_tweedie is None else reals(strengths_tweedie, "--strengths-tweedie"),
        strengths_stitched=None if strengths_stitched is None else reals(strengths_stitched, "--strengths-stitched"),
        methods=() if methods is None else names(methods, "--methods"), options=method_settings(context, options or ()),
    )  # fmt: skip
    unread = table_of(table, settings).unread(settings.methods)
    refuse_given(context, unread, f"no row of {table} that is asked for reads it.")
    report = reproduce(
        table, world, out, settings=settings, values=values, recipe=read_recipe(recipe, {}), scale=scale, **chosen
    )
    if as_json:
        print_json(report)
    else:
        _print(report, out)
    for row in report["failed"]:
        message = " ".join(row["error"].split())
        typer.echo(f"failed: {row['backbone']} x {row['reward']}, {row['row']}: {message}", err=True)
    if report["failed"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any], out: Path) -> None:
    if report["rows"]:
        rows = [
            (row["backbone"], row["reward"], row["label"] + (" *" if row["best"] else ""),
             _number(row["scores"][row["reward"]]), _number(row["gains"][row["reward"]]), _number(row["detector"]),
             _passes(row), f"{row['cost']['seconds']:.0f}")
            for row in report["rows"]
        ]  # fmt: skip
        header = ("backbone", "reward", "method", "mean reward", "paired gain", "fulfilled", "passes", "seconds")
        print_table(header, rows)
    for row in report["not_applicable"]:
        typer.echo(f"Not applicable: {row['row']} on {row['backbone']} x {row['reward']}: {row['reason']}.")
    for pair in report["mixed"]:
        typer.echo(f"Mixed: rows of {pair['backbone']} x {pair['reward']} are by several value models of "
                   f"{pair['source']}; ask for all of its rows by one.")  # fmt: skip
    for reward, reason in report["unfit_rewards"].items():
        typer.echo(f"Left out: {reward}: {reason}")
    if report["partial"]:
        typer.echo(f"Partial: {report['measured']} of {report['expected']} rows.")
    name = report["table"]
    typer.echo(f"Written to {out}: {name}.csv, {name}.json" + (f", {name}.png." if report["rows"] else "."))


def _number(figure: dict[str, float | None] | None) -> str:
    if figure is None:
        return ""
    error = figure["stderr"]
    return f"{figure['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _passes(row: dict[str, Any]) -> str:
    """In denoiser passes where all networks' are known, else the denoiser's alone."""
    total = row["equivalents"]
    return f"{row['cost'].get('denoiser', 0) if total is None else total:,.0f}"
