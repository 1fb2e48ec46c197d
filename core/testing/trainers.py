"""What a method that trains promises, tried on a whole network of the Gaussian world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..costs import CostMeter
from ..errors import NonFiniteError
from ..estimators import Estimator
from ..training.policy import Policy
from ..training.problem import Experience, TrainProblem, Update
from .aligners import PROMPTS, BrokenValue, ConstantValue, CountingBackbone
from .checks import check
from .expect import Mismatch, expect, expect_close, expect_equal, expect_finite, expect_shape, global_randomness_kept
from .gaussian import ExactValue, LinearReward

STEPS = 10
UPDATE = Update(0, (2, 0), (0, 1))
"""Two prompts in another order than in the list."""
SHARED = Update(0, (2, 0, 1, 0), (0, 1, 2, 3))
"""One prompt has two places, whose samples differ."""
ROUNDS = 8
"""More calls of ``gather`` in a row, each reading the one before, than any method needs."""


@attrs.define
class Gather:
    """``gather`` of one of several processes that are run here one after the other, again and again: it gives what all
    of them had at the same call of the round before."""

    joined: Sequence[Tensor] = ()
    given: list[Tensor] = attrs.field(factory=list)

    def __call__(self, tensor: Tensor) -> Tensor:
        self.given.append(tensor)
        return self.joined[len(self.given) - 1] if len(self.given) <= len(self.joined) else tensor


@attrs.define(eq=False)
class TrainTrial:
    """A problem to train on, ``estimator`` exact unless given. The policy is another network than the frozen one and
    the old policy, as it is after a few updates."""

    method: Any
    seed: int = 0
    batch: int = 64
    estimator: Estimator | None = None
    gather: Gather = attrs.field(factory=Gather)
    backbone: CountingBackbone = attrs.field(factory=CountingBackbone)
    problem: TrainProblem = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        backbone, reward = self.backbone, LinearReward()
        policy = Policy.of(backbone, None)
        old = policy.another() if self.method.needs_old else None
        with torch.no_grad():
            for number, parameter in enumerate(policy.parameters.values(), 1):
                parameter.mul_(1 + 0.01 * number)
        side = backbone.native_resolution
        self.problem = TrainProblem(
            policy, backbone, self.estimator or ExactValue(backbone, reward), backbone.encode_prompts(list(PROMPTS)),
            reward.condition(None), backbone.null_condition(), backbone.sigmas(STEPS, (side, side)),
            (backbone.latent_channels, side, side), seed=self.seed, batch=self.batch, old=old, gather=self.gather,
        )  # fmt: skip

    @torch.enable_grad()
    def collect(self, update: Update = UPDATE) -> Experience:
        found: Experience = self.method.collect(self.problem, update)
        return found

    def parts(self, experience: Experience, size: int | None = None) -> list[tuple[Tensor, Mapping[str, float]]]:
        """Losses, with their graph, and figures of ``size`` rows at a time (by default the batch size)."""
        batches = experience.batches(size or self.batch, torch.device("cpu"))
        with torch.enable_grad():
            return [self.method.loss(self.problem, rows) for rows in batches]

    @torch.enable_grad()
    def losses(self, experience: Experience, size: int | None = None) -> Tensor:
        """Those of all rows ``[R]``, with their graph."""
        return torch.cat([losses for losses, _ in self.parts(experience, size)])

    @torch.enable_grad()
    def gradients(self) -> dict[str, Tensor]:
        """Of an update's summed losses in every trained number."""
        parameters = self.problem.policy.parameters
        found = torch.autograd.grad(self.losses(self.collect()).sum(), list(parameters.values()), allow_unused=True)
        given = zip(parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in given}


def tensors(experience: Experience) -> dict[str, Tensor]:
    """All that an experience holds, named for a message."""
    groups = (("samples", experience.samples), ("rows", experience.rows))
    return {f"{name} of the {group}": tensor for group, held in groups for name, tensor in held.items()}


def of_place(experience: Experience, place: int, count: int) -> dict[str, Tensor]:
    """What belongs to the ``count`` samples of the update's ``place``-th prompt; each sample's rows in their order."""
    samples = slice(place * count, (place + 1) * count)
    owner = experience.rows["sample"]
    rows = owner.argsort(stable=True)
    rows = rows[owner[rows] // count == place]
    held = {f"{name} of the samples": tensor[samples] for name, tensor in experience.samples.items()}
    held |= {f"{name} of the rows": tensor[rows] for name, tensor in experience.rows.items()}
    return held | {"sample of the rows": owner[rows] - place * count}


def few(method: Any) -> int:
    """A batch size that cuts two prompts' samples elsewhere than between the prompts, where there are several."""
    return int(method.samples_per_prompt) // 2 + 1


def shared(method: Any, updates: Sequence[Update]) -> list[Experience]:
    """The experience of each process of an update that they share, with a ``gather`` that joins what they have."""
    joined: list[Tensor] = []
    for _ in range(ROUNDS):
        trials = [TrainTrial(method, gather=Gather(joined)) for _ in updates]
        found = [trial.collect(update) for trial, update in zip(trials, updates, strict=True)]
        calls = [trial.gather.given for trial in trials]
        counts = [len(given) for given in calls]
        expect(len(set(counts)) == 1, "every process to call problem.gather as often", f"{counts} calls")
        last, joined = joined, [torch.cat(given) for given in zip(*calls, strict=True)]
        if len(last) == len(joined) and all(map(torch.equal, last, joined)):
            return found
    raise Mismatch(f"what it gathers goes on changing after {ROUNDS} rounds.")


@check("trainer")
def declares(trainer: Any) -> None:
    """It says whether it samples from an old policy, ``needs_old``, and how many ``samples_per_prompt`` it draws."""
    needs_old, count = type(trainer).needs_old, trainer.samples_per_prompt
    expect(type(needs_old) is bool, "needs_old, True or False, of the class", repr(needs_old))
    expect(type(count) is int and count >= 1, "samples_per_prompt, a whole number from 1", repr(count))


@check("trainer")
def experience(trainer: Any) -> None:
    """It collects an Experience on the CPU, without gradient: each prompt's samples in a row, and rows that name them.

    The prompts are in the update's order, so that a group is ``samples_per_prompt`` neighbours.
    """
    trial = TrainTrial(trainer)
    found = trial.collect()
    expect(isinstance(found, Experience), "core.Experience", type(found).__name__)
    owners = trial.problem.owners(UPDATE, trainer.samples_per_prompt)
    what = "owners, the samples' prompts as positions in the whole list"
    expect_equal(found.owners, owners, what, "They are problem.owners(update, samples_per_prompt).")
    for name, tensor in {"owners": found.owners, **tensors(found)}.items():
        expect(tensor.device.type == "cpu", f"{name} on the CPU", tensor.device)
        expect(not tensor.requires_grad, f"{name} without gradient", "a graph", "Collect under torch.no_grad().")
    for group, held, size in (("samples", found.samples, len(owners)), ("rows", found.rows, len(found))):
        for name, tensor in held.items():
            expect(len(tensor) == size, f"{size} entries in {name} of the {group}", len(tensor))
    named = found.rows["sample"]
    inside = named.dtype == torch.int64 and len(named) > 0 and bool(((named >= 0) & (named < len(owners))).all())
    expect(inside, f"rows, whose 'sample' is one of 0 to {len(owners) - 1} as int64", f"{named.dtype} {named.tolist()}")
    check_figures(found.figures)


@check("trainer")
def losses(trainer: Any) -> None:
    """Its loss is one finite number a row, with a finite gradient that reaches the policy; figures are numbers."""
    trial = TrainTrial(trainer)
    found = trial.collect()
    for start, (each, figures) in zip(range(0, len(found), trial.batch), trial.parts(found), strict=True):
        expect_shape(each, (min(trial.batch, len(found) - start),), "losses", "They are not averaged over the rows.")
        expect_finite(each, "losses")
        expect(each.requires_grad, "losses with a gradient", "none", "Are they under torch.no_grad()?")
        check_figures(figures)
    gradients = trial.gradients()
    for name, gradient in gradients.items():
        expect_finite(gradient, f"the gradient of {name}")
    reached = any(bool(gradient.any()) for gradient in gradients.values())
    expect(reached, "a gradient in the policy's parameters", "none", "Denoise with problem.context(rows.owners).")


def check_figures(figures: Mapping[str, float]) -> None:
    """Figures to log are named plain numbers."""
    plain = all(type(name) is str and type(figure) is float for name, figure in figures.items())
    expect(plain, "figures, a dict of names and floats", figures, "Use float(...).")


@check("trainer")
def networks_kept(trainer: Any) -> None:
    """Collecting and the loss change no network and leave a gradient in the policy alone; ``updated`` may change the
    old policy."""
    trial = TrainTrial(trainer)
    problem = trial.problem
    networks = {"the policy": problem.policy.backbone, "the frozen backbone": problem.reference}
    if problem.old is not None:
        networks["the old policy"] = problem.old.backbone
    before = {what: {n: t.clone() for n, t in network.net.state_dict().items()} for what, network in networks.items()}

    def unchanged(after: str) -> None:
        for what, network in networks.items():
            for name, tensor in network.net.state_dict().items():
                expect_equal(tensor, before[what][name], f"{name} of {what} as before {after}")

    found = trial.collect()
    unchanged("collect")
    with torch.enable_grad():
        trial.losses(found).sum().backward()
    unchanged("loss")
    for what, network in networks.items():
        held = [n for n, p in network.net.named_parameters() if p.grad is not None or p.requires_grad]
        expect(what == "the policy" or not held, f"{what} frozen, without a gradient", ", ".join(held))
    networks.pop("the old policy", None)
    trainer.updated(problem, 0)
    unchanged("updated")


@check("trainer")
def same_update(trainer: Any) -> None:
    """The same update again gives the same experience and losses, bit for bit, whatever was collected in between."""
    hint = "All randomness comes from problem.generator and problem.seeds of the update."
    first, later = TrainTrial(trainer), TrainTrial(trainer)
    found = first.collect()
    later.collect(attrs.evolve(UPDATE, number=1))
    again = later.collect()
    expect(tensors(again).keys() == tensors(found).keys(), "the same tensors again", sorted(tensors(again)))
    for name, tensor in tensors(found).items():
        expect_equal(tensors(again)[name], tensor, f"{name} of the same update again", hint)
    ours, theirs = later.losses(again).detach(), first.losses(found).detach()
    expect_equal(ours, theirs, "the losses of the same update again", hint)


@check("trainer")
def other_update(trainer: Any) -> None:
    """Another update, and another seed of the run, gives another experience."""
    found = tensors(TrainTrial(trainer).collect())
    hint = "Draw from problem.seeds(update, samples_per_prompt, stream)."
    others = {
        "update": TrainTrial(trainer).collect(attrs.evolve(UPDATE, number=1)),
        "seed": TrainTrial(trainer, seed=1).collect(),
    }
    for what, given in others.items():
        other = tensors(given)
        same = all(name in other and torch.equal(other[name], tensor) for name, tensor in found.items())
        expect(not same, f"another experience under another {what}", "the same", hint)


@check("trainer")
def any_batch_size(trainer: Any) -> None:
    """The batch size changes no result: neither the experience nor, taken in parts, the losses."""
    whole = TrainTrial(trainer)
    found = whole.collect()
    together = whole.losses(found).detach()
    size = few(trainer)
    small = tensors(TrainTrial(trainer, batch=size).collect())
    hint = "Use problem.rollout and problem.values."
    for name, tensor in tensors(found).items():
        expect_close(small[name], tensor, f"{name} at batch size {size} as at {whole.batch}", hint)
    hint = "Compare samples in collect, where all of them are."
    apart = whole.losses(found, size).detach()
    expect_close(apart, together, f"the losses of {size} rows at a time as of {whole.batch}", hint)


@check("trainer")
def bounded_passes(trainer: Any) -> None:
    """No pass reads more samples than ``problem.batch``, which are the rows of a loss at most."""
    size = few(trainer)
    trial = TrainTrial(trainer, batch=size)
    value = trial.problem.estimator
    trial.losses(trial.collect())
    seen = value.seen if isinstance(value, ExactValue) else []
    longest = max([*trial.backbone.passes, *trial.backbone.decoded, *seen], default=0)
    hint = "Use problem.rollout and problem.values, which do."
    expect(longest <= size, f"passes of at most {size} samples, the batch size", f"one of {longest}", hint)


@check("trainer")
def counted_passes(trainer: Any) -> None:
    """Every pass through the denoiser and the decoder that runs is counted."""
    trial = TrainTrial(trainer)
    with CostMeter() as meter:
        trial.losses(trial.collect())
    for kind, ran in (("denoiser", trial.backbone.passes), ("decoder", trial.backbone.decoded)):
        hint = "Denoise with problem.context(owners).denoiser or backbone.denoise."
        expect(meter.passes[kind] == sum(ran), f"{sum(ran)} {kind} passes counted", meter.passes[kind], hint)


@check("trainer")
def shared_update(trainer: Any) -> None:
    """Processes that share an update's prompts collect together what one would have collected."""
    count = trainer.samples_per_prompt
    (whole,) = shared(trainer, [SHARED])
    mine = [range(first, len(SHARED.places), 2) for first in range(2)]
    updates = [Update(0, tuple(SHARED.prompts[k] for k in own), tuple(own)) for own in mine]
    hint = "Name randomness by update.places, and let statistics over all samples read problem.gather."
    for own, found in zip(mine, shared(trainer, updates), strict=True):
        for row, place in enumerate(own):
            ours, theirs = of_place(found, row, count), of_place(whole, place, count)
            expect(ours.keys() == theirs.keys(), "the same tensors in every process", sorted(ours))
            for name, tensor in theirs.items():
                compare = expect_close if tensor.is_floating_point() else expect_equal
                compare(ours[name], tensor, f"{name} at place {place} as of one process", hint)


@check("trainer")
def global_randomness(trainer: Any) -> None:
    """It neither draws from nor seeds the process's own random generator."""
    trial = TrainTrial(trainer)
    with global_randomness_kept("training"):
        trial.losses(trial.collect())
        trainer.updated(trial.problem, 0)


@check("trainer")
def knows_nothing(trainer: Any) -> None:
    """A value that is the same everywhere, and tells nothing, gives finite losses."""
    trial = TrainTrial(trainer, estimator=ConstantValue())
    expect_finite(trial.losses(trial.collect()), "losses under a constant value", "Is something divided by its spread?")


@check("trainer", needs="estimator")
def follows_the_value(trainer: Any) -> None:
    """The estimator's value matters: the opposite value gives another gradient."""
    backbone = CountingBackbone()
    values = [ExactValue(backbone, LinearReward(weight)) for weight in ((1.0, -0.5, 0.25), (-1.0, 0.5, -0.25))]
    found, other = (TrainTrial(trainer, estimator=value).gradients() for value in values)
    differ = any(not torch.equal(found[name], other[name]) for name in found)
    expect(differ, "another gradient under the opposite value", "the same")


@check("trainer", needs="estimator")
def value_not_finite(trainer: Any) -> None:
    """A value that is not finite is never turned into a finite loss: it is an error, or the loss is not finite."""
    trial = TrainTrial(trainer, estimator=BrokenValue())
    try:
        found = trial.losses(trial.collect())
    except NonFiniteError:
        return
    finite = int(found.isfinite().sum())
    hint = "problem.advantages raises an error; do not mask or replace a value."
    expect(len(found) > 0 and not finite, "an error, or losses of NaN", f"{finite} finite of {len(found)}", hint)
