"""What one iteration of training costs on Stable Diffusion 3.5 Medium at 512 pixels, plain and stopped early.

    python benchmarks/training_sd35.py --threads 2 --repeats 1   # 6 GB, and what the decoder's gradient needs
    python benchmarks/training_sd35.py --dtype float32 --steps 4 # on a CPU that is slow at bfloat16
    python benchmarks/training_sd35.py --small                   # the registry's twins: does it run?

Random weights, a LoRA of rank 32, no classifier-free guidance, 10 sampling steps, gradient checkpointing, one prompt
with two samples, one at a time. *Plain* maximises the clean reward of a whole rollout, *stopped* the stitched value
after half the steps. DiffusionNFT reads every sample at all of the sampler's levels above the stop. Every
figure is a fresh process; it reports seconds, passes and the peak of memory above the weights of an iteration (to
collect, the loss and its gradient, the optimiser's step). The table is also written as JSON. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from processes import arguments, fresh, parser_of, processor
from sd35 import BACKBONE, INTERFACE, REWARD, SMALL_INTERFACE, Networks, PeakMemory, networks_for

from stitchvm.core import CostMeter, LoraSettings, Policy, Stitched, TrainingMethod, TrainProblem, Tweedie, Update
from stitchvm.core.costs import differentiating
from stitchvm.core.provenance import versions
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.draft import Draft

GB = 1e9
STEPS, SAMPLES = 10, 2


@attrs.frozen
class Figure:
    """One measurement: a method, for the clean reward or stopped half way for the stitched value."""

    label: str
    method: type[Draft | DiffusionNft]
    stopped: bool

    def trainer(self, steps: int) -> TrainingMethod:
        """The method for rollouts of ``steps``."""
        halfway = (steps // 2, steps // 2) if self.stopped else None
        return self.method(samples_per_prompt=SAMPLES, stop=halfway)


FIGURES = {
    "draft": Figure("DRaFT-1, plain", Draft, False),
    "draft-stopped": Figure("DRaFT-1, stopped", Draft, True),
    "nft": Figure("DiffusionNFT, plain", DiffusionNft, False),
    "nft-stopped": Figure("DiffusionNFT, stopped", DiffusionNft, True),
}


def problem_of(networks: Networks, figure: Figure, steps: int) -> TrainProblem:
    """One prompt, one sample a pass."""
    networks.checkpoint_gradients()
    policy = Policy.of(networks.backbone, LoraSettings())
    channels, side = networks.noise.shape[1], networks.noise.shape[-1]
    return TrainProblem(
        policy, networks.backbone, Stitched(networks.value) if figure.stopped else Tweedie(networks.reward),
        networks.prompt, networks.text, networks.null, networks.backbone.sigmas(steps, (side, side)).to(networks.noise),
        (channels, side, side), batch=1, old=policy.another() if figure.trainer(steps).needs_old else None,
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


def measure(networks: Networks, figure: Figure, repeats: int, steps: int = STEPS) -> dict[str, Any]:
    """``seconds`` of every iteration, ``passes`` of one, and ``memory``, the peak above the weights in bytes."""
    problem, method, costs = problem_of(networks, figure, steps), figure.trainer(steps), []
    optimiser = torch.optim.AdamW(problem.policy.parameters.values(), lr=1e-4)
    with PeakMemory(networks.noise.device) as memory:
        for number in range(repeats):
            with CostMeter() as cost:
                iterate(problem, method, optimiser, number)
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


def report(figures: Mapping[str, Mapping[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """JSON-able: what was measured on what, and what follows."""
    known = {name: None if math.isnan(ratio) else ratio for name, ratio in ratios(figures).items()}
    return {
        "backbone": BACKBONE, "reward": REWARD,
        "interface": attrs.asdict(SMALL_INTERFACE if given.small else INTERFACE),
        "small": given.small, "steps": given.steps, "stop": given.steps // 2, "samples": SAMPLES, "dtype": given.dtype,
        "versions": versions(), "figures": figures, "ratios": known,
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
    parser = parser_of(__doc__ or "", FIGURES)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a whole rollout, even (default: %(default)s)")
    given = arguments(parser, settings)
    if given.steps < 2 or given.steps % 2:
        parser.error("--steps must be even and at least 2.")
    if given.figure:
        found = measure(networks_for(given), FIGURES[given.figure], given.repeats, given.steps)
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    figures = {name: fresh(__file__, name, given) for name in given.only or FIGURES}
    out = given.out or (None if given.small or given.only else Path(__file__).with_suffix(".json"))
    if out:
        out.write_text(json.dumps(report(figures, given), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(figures) + "\n")
    return int(any("failed" in found for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
