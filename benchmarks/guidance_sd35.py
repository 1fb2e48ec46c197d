"""What guidance by a stitched value costs on Stable Diffusion 3.5 Medium at 512 pixels, against Tweedie's estimate.

    python benchmarks/guidance_sd35.py --threads 2      # about 6 GB of weights, and what Tweedie's gradient needs
    python benchmarks/guidance_sd35.py --in-turn        # for ratios where the machine's speed drifts
    python benchmarks/guidance_sd35.py --small          # the registry's twins: does it run?

Random weights in bfloat16, one latent, classifier-free guidance of 4.5, on CUDA where there is one. Every figure is a
fresh process that builds the networks (see ``sd35.py``), takes one step to warm up and ``--repeats`` more along a
sampling run of 100, the steps that ``dps`` and ``fk-steering`` take, and reports seconds, forward passes and the peak
of memory above the weights. ``--in-turn`` has one process take a step of every figure in turn, ``--repeats`` times,
and takes the median of the rounds' ratios; it tells no memory and leaves gradient checkpointing out. The table is also
written as JSON. Needs Linux. Exits with 1 when a figure failed or, at full size, a target is missed.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import attrs
import torch
from processes import arguments, fresh, parser_of, processor
from sd35 import BACKBONE, GUIDANCE_SCALE, INTERFACE, REWARD, SMALL_INTERFACE, STEPS, Networks, PeakMemory, networks_for
from torch import Tensor

from stitchvm.core import AlignProblem, CostMeter, NonFiniteError, Stitched, Tweedie
from stitchvm.core.provenance import versions
from stitchvm.plugins.aligners.dps import Dps

GB = 1e9
FIRST_STEP = STEPS // 4
"""A step where latent and noise both count, and where FK steering draws proposals."""

METHOD = Dps(kernel="sde")


@attrs.frozen
class Figure:
    """One measurement: a step whose latent is only denoised, guided by a value's gradient, or the best of some
    ``proposals``; or no step but a value of the latent."""

    label: str
    task: Literal["denoise", "guide", "propose", "value"]
    estimator: Literal["stitched", "tweedie"] | None = None
    reuse: bool = True
    checkpointing: bool = False
    proposals: int = 1


FIGURES = {
    "unguided": Figure("unguided step", "denoise"),
    "stitched": Figure("step guided by the stitched value", "guide", "stitched"),
    "stitched-no-reuse": Figure("the same, no pass reused", "guide", "stitched", reuse=False),
    "tweedie": Figure("step guided by Tweedie's estimate", "guide", "tweedie"),
    "tweedie-checkpointing": Figure("the same, gradient checkpointing", "guide", "tweedie", checkpointing=True),
    "one-proposal": Figure("FK step, 1 proposal, stitched value", "propose", "stitched"),
    "two-proposals": Figure("FK step, 2 proposals, stitched value", "propose", "stitched", proposals=2),
    "tweedie-value": Figure("Tweedie's estimate, no gradient", "value", "tweedie"),
}


@attrs.frozen
class Ratio:
    """``value`` and the ``target`` it has to keep to, at most or at least; NaN where a figure is missing."""

    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """None without a target or a value."""
        if self.target is None or math.isnan(self.value):
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def goal(self) -> str | None:
        return None if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"


@torch.no_grad()
def take_step(problem: AlignProblem, figure: Figure, latents: Tensor, step: int) -> Tensor:
    """Latents after ``step``, as the aligners take it; the same ones where a value alone is read."""
    sigma, following = problem.sigmas[step], problem.sigmas[step + 1]
    if figure.task == "value":
        problem.estimate(latents, sigma)
        return latents
    if figure.task == "guide":
        look = problem.differentiate(latents, sigma)
        prediction = look.prediction.guided(METHOD.score_change(look))
    else:
        prediction = problem.denoise(latents, sigma)
    transition = METHOD.transition_kernel()(prediction, following.expand(len(latents)).to(latents))
    if figure.task == "propose":
        return problem.propose(transition, figure.proposals, following)[0]
    return problem.draw(transition)


@attrs.define(eq=False)
class Walk:
    """The steps of one figure, which follow one another: a pass begun for a proposal is finished by the next step."""

    figure: Figure
    problem: AlignProblem
    latents: Tensor
    costs: list[CostMeter] = attrs.field(factory=list)

    @classmethod
    def of(cls, networks: Networks, figure: Figure) -> Self:
        estimator = {"stitched": Stitched(networks.value), "tweedie": Tweedie(networks.reward), None: None}
        if figure.checkpointing:
            networks.checkpoint_gradients()
        return cls(figure, networks.problem(estimator[figure.estimator], reuse=figure.reuse), networks.noise)

    def take(self, step: int) -> None:
        with CostMeter() as cost:
            self.latents = take_step(self.problem, self.figure, self.latents, step)
            if self.latents.device.type == "cuda":
                torch.cuda.synchronize(self.latents.device)
        self.costs.append(cost)

    def found(self) -> dict[str, Any]:
        """``seconds`` of every step but the first, and ``passes`` of one."""
        if not bool(self.latents.isfinite().all()):
            raise NonFiniteError(f"the latents of {self.figure.label!r} are not finite, so it took no ordinary step.")
        seconds = [cost.seconds for cost in self.costs[1:]]
        return {
            "label": self.figure.label, "seconds": seconds, "min": min(seconds), "median": statistics.median(seconds),
            "passes": dict(self.costs[-1].passes), "threads": torch.get_num_threads(),
            "device": processor(self.latents.device),
        }  # fmt: skip


def steps_of(repeats: int) -> range:
    """One to warm up, and those that count."""
    return range(FIRST_STEP, FIRST_STEP + repeats + 1)


def measure(networks: Networks, figure: Figure, repeats: int) -> dict[str, Any]:
    """What :meth:`Walk.found` has, and ``memory``, the peak above the weights in bytes."""
    walk = Walk.of(networks, figure)
    with PeakMemory(networks.noise.device) as memory:
        for step in steps_of(repeats):
            walk.take(step)
    return walk.found() | {"memory": memory.bytes}


def measure_in_turn(networks: Networks, names: Iterable[str], repeats: int) -> dict[str, dict[str, Any]]:
    """What :meth:`Walk.found` has of each, all in this process and a step of each in turn."""
    walks = {name: Walk.of(networks, FIGURES[name]) for name in names}
    for step in steps_of(repeats):
        for walk in walks.values():
            walk.take(step)
    return {name: walk.found() | {"in_turn": True} for name, walk in walks.items()}


def ratios(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Ratio]:
    """What the figures say of each other: by the least of each one's seconds, which other processes disturb least, or
    where they were taken in turn the median of what each round says."""
    if not all(found.get("in_turn") for found in figures.values()):
        return _ratios(figures)
    rounds = zip(*(found["seconds"] for found in figures.values()), strict=True)
    said = [_ratios({name: {"min": took} for name, took in zip(figures, times, strict=True)}) for times in rounds]
    return {
        name: attrs.evolve(ratio, value=_median([one[name].value for one in said])) for name, ratio in said[0].items()
    }


def _median(values: Sequence[float]) -> float:
    """NaN where one of them is."""
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def _ratios(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Ratio]:
    """Of the seconds ``min`` and the ``memory`` of each.

    A proposal costs what a step with two takes longer than one with one: another value, whose head's pass is not
    finished. Each of two costs less, as the next step goes on from the pass of the one that is kept.
    """

    def known(name: str, key: str) -> float:
        return float(figures.get(name, {}).get(key, math.nan))

    def of(key: str, over: str, under: str) -> float:
        return _quotient(known(over, key), known(under, key))

    step, of_two = known("unguided", "min"), known("two-proposals", "min")
    proposal = of_two - known("one-proposal", "min")
    return {
        "guided / unguided step": Ratio(of("min", "stitched", "unguided"), 1.4),
        "guided without reuse / unguided step": Ratio(of("min", "stitched-no-reuse", "unguided")),
        "Tweedie-guided / guided step": Ratio(of("min", "tweedie", "stitched"), 4.5, at_least=True),
        "the same, checkpointing": Ratio(of("min", "tweedie-checkpointing", "stitched")),
        "memory, guided / Tweedie-guided": Ratio(of("memory", "stitched", "tweedie"), 0.15),
        "memory, guided / checkpointing": Ratio(of("memory", "stitched", "tweedie-checkpointing")),
        "proposal / unguided step": Ratio(_quotient(proposal, step), 0.15),
        "each of two proposals / unguided step": Ratio(_quotient((of_two - step) / 2, step)),
        "Tweedie's estimate / proposal": Ratio(_quotient(known("tweedie-value", "min"), proposal), 10, at_least=True),
    }


def _quotient(over: float, under: float) -> float:
    """NaN where one of both is lost in the noise of the measurement."""
    return over / under if over > 0 and under > 0 else math.nan


def report(figures: Mapping[str, Mapping[str, Any]], small: bool, dtype: str) -> dict[str, Any]:
    """JSON-able: what was measured on what, and what follows."""
    interface = SMALL_INTERFACE if small else INTERFACE
    return {
        "backbone": BACKBONE, "reward": REWARD, "interface": attrs.asdict(interface), "small": small,
        "guidance_scale": GUIDANCE_SCALE, "dtype": dtype, "versions": versions(), "figures": figures,
        "ratios": {
            name: {"value": None if math.isnan(ratio.value) else ratio.value, "target": ratio.goal, "met": ratio.met}
            for name, ratio in ratios(figures).items()
        },
    }  # fmt: skip


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The measurements for people: seconds, GB, and the forward passes of one step."""
    lines = ["| figure | least s | median s | memory above the weights, GB | passes |", "| --- " * 5 + "|"]
    for name, found in figures.items():
        label = FIGURES[name].label
        if "failed" in found:
            lines.append(f"| {label} | {found['failed']} | | | |")
            continue
        passes = ", ".join(f"{count} {kind}" for kind, count in found["passes"].items())
        memory = f"{found['memory'] / GB:.3f}" if "memory" in found else ""
        lines.append(f"| {label} | {found['min']:.3f} | {found['median']:.3f} | {memory} | {passes} |")
    for name, ratio in ratios(figures).items():
        verdict = {True: "ok", False: "MISSED", None: "not measured"}[ratio.met]
        goal = "" if ratio.goal is None else f", target {ratio.goal}: {verdict}"
        lines.append(f"{name}: {ratio.value:.3f}{goal}")
    return "\n".join(lines)


def main(settings: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__ or "", FIGURES)
    parser.add_argument("--in-turn", action="store_true", help="one process for all; see above")
    given = arguments(parser, settings)
    if given.figure:
        sys.stdout.write(json.dumps(measure(networks_for(given), FIGURES[given.figure], given.repeats)) + "\n")
        return 0
    names = list(given.only or FIGURES)
    if given.in_turn:
        alike = [name for name in names if not FIGURES[name].checkpointing]
        figures = measure_in_turn(networks_for(given), alike, given.repeats)
    else:
        figures = {name: fresh(__file__, name, given) for name in names}
    out = given.out or (None if given.small or given.only or given.in_turn else Path(__file__).with_suffix(".json"))
    if out:
        out.write_text(json.dumps(report(figures, given.small, given.dtype), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(figures) + "\n")
    missed = not given.small and any(ratio.met is False for ratio in ratios(figures).values())
    return int(missed or any("failed" in found for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
