"""What one iteration of training costs on Stable Diffusion 3.5 Medium at 512 pixels, plain and stopped early.

    python benchmarks/training_sd35.py --threads 2 --repeats 1   # 6 GB, and what the decoder's gradient needs
    python benchmarks/training_sd35.py --small                   # the registry's twins: does it run?

Random weights in bfloat16, a LoRA of rank 32, no classifier-free guidance, 10 sampling steps, gradient checkpointing,
one prompt with two samples, one at a time. *Plain* maximises the clean reward of a whole rollout, *stopped* the
stitched value after 5 steps. DiffusionNFT reads every sample at all of the sampler's levels above the stop. Every
figure is a fresh process; it reports seconds, passes and the peak of memory above the weights of an iteration (to
collect, the loss and its gradient, the optimiser's step). The table is also written as JSON. Needs Linux.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from processes import arguments, fresh, processor
from sd35 import BACKBONE, INTERFACE, REWARD, SMALL_INTERFACE, Networks, PeakMemory

from stitchvm.core import CostMeter, LoraSettings, Policy, Stitched, TrainingMethod, TrainProblem, Tweedie, Update
from stitchvm.core.costs import differentiating
from stitchvm.core.provenance import versions
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft

GB = 1e9
STEPS, STOP, SAMPLES = 10, 5, 2


@attrs.frozen
class Figure:
    """One measurement: a method, for the clean reward or stopped for the stitched value."""

    label: str
    method: TrainingMethod
    stopped: bool


FIGURES = {
    "draft": Figure("DRaFT-1, plain", Draft(samples_per_prompt=SAMPLES), False),
    "draft-stopped": Figure("DRaFT-1, stopped", Draft(samples_per_prompt=SAMPLES, stop=(STOP, STOP)), True),
    "nft": Figure("DiffusionNFT, plain", DiffusionNft(samples_per_prompt=SAMPLES), False),
    "nft-stopped": Figure(
        "DiffusionNFT, stopped", DiffusionNft(samples_per_prompt=SAMPLES, stop=(STOP, STOP)), True
    ),
}


def problem_of(networks: Networks, figure: Figure) -> TrainProblem:
    """One prompt, one sample a pass."""
    networks.checkpoint_gradients()
    policy = Policy.of(networks.backbone, LoraSettings())
    channels, side = networks.noise.shape[1], networks.noise.shape[-1]
    return TrainProblem(
        policy, networks.backbone, Stitched(networks.value) if figure.stopped else Tweedie(networks.reward),
        networks.prompt, networks.text, networks.null, networks.backbone.sigmas(STEPS, (side, side)).to(networks.noise),
        (channels, side, side), batch=1, old=policy.another() if figure.method.needs_old else None,
    )  # fmt: skip


def iterate(problem: TrainProblem, method: TrainingMethod, optimiser: torch.optim.Optimizer, number: int) -> None:
    """One update, as the trainer takes it."""
    experience = method.collect(problem, Update(number, (0,), (0,)))
    with differentiating():
        for rows in experience.batches(problem.batch, problem.device):
            losses, _ = method.loss(problem, rows)
            (losses.sum() / len(experience)).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    method.updated(problem, number)


def measure(networks: Networks, figure: Figure, repeats: int) -> dict[str, Any]:
    """``seconds`` of every iteration, ``passes`` of one, and ``memory``, the peak above the weights in bytes."""
    problem, costs = problem_of(networks, figure), []
    optimiser = torch.optim.AdamW(problem.policy.parameters.values(), lr=1e-4)
    with PeakMemory(networks.noise.device) as memory:
        for number in range(repeats):
            with CostMeter() as cost:
                iterate(problem, figure.method, optimiser, number)
            costs.append(cost)
    seconds = [cost.seconds for cost in costs]
    return {
        "label": figure.label, "seconds": seconds, "min": min(seconds), "median": statistics.median(seconds),
        "memory": memory.bytes, "passes": dict(costs[-1].passes), "threads": torch.get_num_threads(),
        "device": processor(networks.noise.device),
    }  # fmt: skip


def ratios(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Stopped over plain, in seconds (the least of the repeats) and memory; NaN where a figure is missing."""
    found = {}
    for name, label in (("draft", "DRaFT-1"), ("nft", "DiffusionNFT")):
        for key, word in (("min", "time"), ("memory", "memory")):
            plain, stopped = (figures.get(which, {}).get(key, math.nan) for which in (name, f"{name}-stopped"))
            found[f"{label}, stopped / plain, {word}"] = stopped / plain if plain else math.nan
    return found


def report(figures: Mapping[str, Mapping[str, Any]], small: bool) -> dict[str, Any]:
    """JSON-able: what was measured on what, and what follows."""
    known = {name: None if math.isnan(ratio) else ratio for name, ratio in ratios(figures).items()}
    return {
        "backbone": BACKBONE, "reward": REWARD, "interface": attrs.asdict(SMALL_INTERFACE if small else INTERFACE),
        "small": small, "steps": STEPS, "stop": STOP, "samples": SAMPLES, "dtype": "bfloat16", "versions": versions(),
        "figures": figures, "ratios": known,
    }  # fmt: skip


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The measurements for people."""
    lines = ["| iteration | least s | memory above the weights, GB | passes |", "| --- " * 4 + "|"]
    for name, found in figures.items():
        label = FIGURES[name].label
        if "failed" in found:
            lines.append(f"| {label} | {found['failed']} | | |")
            continue
        passes = ", ".join(f"{count} {kind}" for kind, count in found["passes"].items())
        lines.append(f"| {label} | {found['min']:.1f} | {found['memory'] / GB:.2f} | {passes} |")
    return "\n".join([*lines, *(f"{name}: {ratio:.3f}" for name, ratio in ratios(figures).items())])


def main(settings: Sequence[str] | None = None) -> int:
    given = arguments(__doc__ or "", FIGURES, settings)
    if given.figure:
        networks = Networks.build(small=given.small, device="cuda" if torch.cuda.is_available() else "cpu")
        sys.stdout.write(json.dumps(measure(networks, FIGURES[given.figure], given.repeats)) + "\n")
        return 0
    figures = {name: fresh(__file__, name, given) for name in ([given.only] if given.only else FIGURES)}
    out = given.out or (None if given.small or given.only else Path(__file__).with_suffix(".json"))
    if out:
        out.write_text(json.dumps(report(figures, given.small), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(figures) + "\n")
    return int(any("failed" in found for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
