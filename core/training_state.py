"""What a training keeps in its folder: the checkpoint it goes on from, and the record that people read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch

from .alignment_result import check_same
from .checkpoints import load_optimiser, optimiser_tensors, under
from .costs import KINDS, peak_memory
from .errors import ConfigError
from .files import read_metadata, read_tensors, write_json, write_tensors
from .policy import Policy
from .provenance import sampled_identity, versions
from .structuring import plain
from .training_evaluation import best_of
from .training_settings import TrainSettings

if TYPE_CHECKING:
    from .training_evaluation import Gallery
    from .training_problem import TrainingMethod, TrainProblem

STATE, RECORD, BEST = "state.safetensors", "train.json", "best"


@attrs.define(eq=False)
class TrainingRecord:
    """A run so far: ``settings`` are all that decides it; ``history`` has one entry an update, ``evaluations`` one each
    time the averaged weights were sampled; ``passes`` (of all processes) and ``seconds`` are the updates' alone, over
    all sessions."""

    settings: dict[str, Any]
    history: list[dict[str, float]] = attrs.field(factory=list)
    evaluations: list[dict[str, Any]] = attrs.field(factory=list)
    passes: Counter[str] = attrs.field(factory=Counter)
    seconds: float = 0.0

    @classmethod
    def about(
        cls, name: str, method: TrainingMethod, plan: TrainSettings, problem: TrainProblem, gallery: Gallery,
        prompts: Sequence[str],
    ) -> Self:  # fmt: skip
        """The record of a run that has not begun."""
        from .alignment import estimator_identity, prompts_digest

        training = plain(plan)
        # these change no weight
        for free in ("updates", "batch", "gradient_checkpointing", "evaluate_every", "checkpoint_every", "tracker",
                     "shard"):  # fmt: skip
            training.pop(free)
        if training["head"] == "frozen":  # as all were before it could be asked for
            training.pop("head")
        settings = {
            "method": name, "method_settings": plain(method), "training": training,
            "estimator": estimator_identity(problem.estimator), "backbone": sampled_identity(problem.reference),
            "rewards": gallery.identities(), "seed": problem.seed, "steps": problem.steps,
            "guidance_scale": float(problem.guidance_scale), "latent_shape": list(problem.latent_shape),
            "prompts": prompts_digest(prompts), "evaluation_prompts": prompts_digest(gallery.prompts),
        }  # fmt: skip
        return cls(dict(json.loads(json.dumps(settings, default=repr))))

    @property
    def updates(self) -> int:
        return len(self.history)

    @property
    def best(self) -> Mapping[str, Any]:
        """The evaluation with the highest mean of the trained reward, whose weights are in ``best``."""
        return best_of(self.evaluations)

    def check_evaluated(self, names: Sequence[str], folder: Path) -> None:
        """:class:`ConfigError` where what was evaluated so far is not what will be."""
        if self.evaluations and set(before := list(self.evaluations[0]["scores"])) != set(names):
            raise ConfigError(
                f"{str(folder)!r} holds a run evaluated by {', '.join(before)}, now by {', '.join(names)}. Give the "
                "same held-out rewards and judges, or choose another folder."
            )

    def add(self, figures: dict[str, float], passes: Counter[str], seconds: float) -> None:
        """One more update."""
        self.history.append(figures)
        self.passes.update(passes)
        self.seconds += seconds

    def cost(self) -> dict[str, float]:
        """JSON-able: passes by kind (only kinds that ran), ``seconds``, ``peak_memory`` in bytes."""
        ran = {kind: self.passes[kind] for kind in KINDS if self.passes[kind]}
        return {**ran, "seconds": round(self.seconds, 3), "peak_memory": peak_memory()}

    def write(self, folder: Path) -> None:
        """``train.json``, and ``training.png`` once there is something to draw."""
        from . import training_plots

        write_json(folder / RECORD, {
            "settings": self.settings, "seed": self.settings["seed"], "versions": versions(), "cost": self.cost(),
            "updates": self.updates, "best_update": self.best["update"], "evaluations": self.evaluations,
            "history": self.history,
        })  # fmt: skip
        if len(self.evaluations) > 1:
            training_plots.training_curves(self.evaluations, folder / "training.png")


@attrs.define(eq=False)
class TrainingState:
    """Everything that moves: the policy's numbers, their averages, the old policy's, the optimiser's."""

    folder: Path
    policy: Policy
    old: Policy | None
    optimiser: torch.optim.Optimizer
    decay: float
    averages: Policy

    @classmethod
    def begin(
        cls, folder: Path, policy: Policy, old: Policy | None, optimiser: torch.optim.Optimizer, decay: float
    ) -> Self:
        return cls(folder, policy, old, optimiser, decay, policy.another())

    def average(self, number: int) -> None:
        """Follow the policy after update ``number``, closely at first."""
        self.averages.follow(self.policy, min(self.decay, (1 + number) / (10 + number)))

    def save(self, record: TrainingRecord, write: bool) -> None:
        """Write the checkpoint, whole or not at all. All processes call it; one alone has ``write``."""
        parts = {"policy": self.policy.tensors(), "average": self.averages.tensors()}
        if self.old is not None:
            parts["old"] = self.old.tensors()
        tensors = {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}
        tensors |= optimiser_tensors(self.optimiser)
        kept = {field.name: getattr(record, field.name) for field in attrs.fields(type(record))}
        if write:
            write_tensors(self.folder / STATE, tensors, {"record": json.dumps(kept)})

    def save_best(self, write: bool) -> None:
        """Write the averaged weights to ``best``, in the place of what was there. All processes call it, see
        :meth:`save`."""
        place = self.folder / BEST
        partial = place.with_name(f"{BEST}.partial")
        self.averages.save(partial, write=write)
        if write:
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)

    def restore(self, record: TrainingRecord) -> TrainingRecord:
        """Take the checkpoint of the same run, if there is one, and return its record.

        Raises :class:`ConfigError` for another run's, naming what differs.
        """
        path = self.folder / STATE
        if not path.exists():
            return record
        kept = json.loads(read_metadata(path)["record"])
        check_same(kept["settings"], record.settings, self.folder)
        tensors = read_tensors(path)
        self.policy.load(under("policy", tensors))
        self.averages.load(under("average", tensors))
        if self.old is not None:
            self.old.load(under("old", tensors))
        load_optimiser(self.optimiser, tensors)
        return TrainingRecord(**{**kept, "passes": Counter(kept["passes"])})
