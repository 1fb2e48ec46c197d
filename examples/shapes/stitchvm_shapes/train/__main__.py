"""`python -m stitchvm_shapes.train`: retrain every model of this package from nothing; run it again to resume."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import card, measure
from .stages import STAGES, Plan, export_checkpoint


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"unknown model {unknown[0]!r}; known are {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


def main(arguments: list[str] | None = None) -> None:
    """Train, export and measure the chosen models."""
    parser = argparse.ArgumentParser(prog="python -m stitchvm_shapes.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("shapes-weights"), help="folder for the finished models")
    parser.add_argument("--work", type=Path, default=Path("shapes-train"), help="folder for scenes and checkpoints")
    parser.add_argument(
        "--only", type=_stages, default=list(STAGES), help=f"train and measure some of {','.join(STAGES)}"
    )
    parser.add_argument(
        "--minutes-scale", type=float, default=1.0, help="train this many times as long as the shipped models"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    parser.add_argument("--bfloat16", action="store_true", help="train the flow model under bfloat16 autocast")
    parser.add_argument("--export", action="store_true", help="only export the unfinished flow model and measure")
    options = parser.parse_args(arguments)
    if options.minutes_scale <= 0:
        parser.error("--minutes-scale is above zero")
    torch.set_num_threads(options.threads)
    plan = Plan(options.work, options.out, options.minutes_scale, options.seed, options.bfloat16)
    plan.work.mkdir(parents=True, exist_ok=True)
    plan.out.mkdir(parents=True, exist_ok=True)
    if options.export:
        export_checkpoint(plan, "mmdit")
    else:
        for name in options.only:
            STAGES[name](plan)
    card.write(plan, measure.measure(plan, ["mmdit"] if options.export else options.only))
    print((plan.out / "README.md").read_text())


if __name__ == "__main__":
    main()
