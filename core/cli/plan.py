"""``stitchvm plan``: what a stitch will cost, before anything is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .options import BackboneName, Taps, numbers
from .output import Json, print_json, print_table

if TYPE_CHECKING:
    from ..planning.run import Need, Plan

_JOBS = {
    "value": "value of a latent",
    "tweedie": "Tweedie: denoise, decode, reward",
    "tweedie_given": "Tweedie, denoised already",
    "monte_carlo": "Monte Carlo: {rollouts} rollouts of {steps} steps",
    "search": "search: {probes} images, every cut",
    "cache": "cache targets: {images} images",
    "epoch": "finetune: an epoch of {images} images",
}


def command(
    backbone: BackboneName,
    reward: Annotated[str, typer.Argument(metavar="REWARD", help="A reward of 'stitchvm list'.")],
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels (default: the backbone's own).")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Say whether it fits, and at which batch, into 10^9 bytes each.")
    ] = None,
    cut: Annotated[int | None, typer.Option(help="Backbone cut (default: half of its blocks).")] = None,
    block: Annotated[int, typer.Option(help="Reward block to enter before.")] = 1,
    taps: Taps = None,
    images: Annotated[int, typer.Option(help="Images in an epoch of finetuning.")] = 100_000,
    batch: Annotated[int, typer.Option(help="Examples in a finetune step.")] = 128,
    steps: Annotated[int, typer.Option(help="Denoising steps of a Monte Carlo rollout.")] = 28,
    rollouts: Annotated[int, typer.Option(help="Rollouts of a Monte Carlo estimate.")] = 4,
    as_json: Json = False,
) -> None:
    """Say what a stitch will cost: weights, FLOPs and memory, beside Tweedie's estimate and Monte Carlo."""
    if gpu_memory is not None and not gpu_memory > 0:
        raise ConfigError(f"--gpu-memory is {gpu_memory:g}; give a positive number of gigabytes, such as 24.")
    from ..planning.run import plan

    found = plan(
        backbone, reward, resolution=resolution, cut=cut, block=block, images=images, batch=batch, steps=steps,
        rollouts=rollouts, taps=() if taps is None else numbers(taps, "--taps"),
    )  # fmt: skip
    if as_json:
        print_json(found.report(gpu_memory))
    else:
        _print(found, gpu_memory)


def _print(found: Plan, gpu_memory: float | None) -> None:
    typer.echo(
        f"{found.reward} stitched to {found.backbone} at {found.resolution} pixels, cut after block "
        f"{found.interface.i} and before block {found.interface.j}; a guided step takes {found.passes} denoiser "
        f"pass{'es' * (found.passes > 1)}.\n"
    )
    parts = [
        (name, f"{cost.parameters / 1e6:,.1f} M", _bytes(cost.bytes), f"{cost.flops / 1e9:,.1f} G")
        for name, cost in found.parts.items()
    ]
    print_table(("part", "parameters", "weights", "FLOPs a sample"), parts)
    typer.echo()
    fits = {} if gpu_memory is None else found.fits(gpu_memory)
    rows = [
        (*_row(found, name, need), *([_fit(fits[name], need)] if fits else [])) for name, need in found.jobs.items()
    ]
    last = () if gpu_memory is None else (f"in {gpu_memory:g} GB",)
    print_table(("job", "FLOPs", "memory", "at batch", *last), rows)


def _row(found: Plan, name: str, need: Need) -> tuple[str, ...]:
    settings = found.settings
    job = _JOBS[name].format(
        rollouts=settings.rollouts, steps=settings.steps, probes=settings.probes, images=f"{settings.images:,}"
    )
    return job, f"{need.flops / 1e12:,.2f} T", _bytes(need.memory), str(need.batch)


def _fit(largest: int, need: Need) -> str:
    if largest < 1:
        return f"does not fit: needs {_bytes(need.fixed + need.sample)}"
    return f"batch {largest}" + ("" if largest >= need.batch else f", not {need.batch}")


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
