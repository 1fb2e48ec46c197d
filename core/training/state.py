"""What a training keeps in its folder: the checkpoint it goes on from, and the record that people read."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch

from ..alignment.given import estimator_identity, prompts_digest
from ..alignment.result import check_same
from ..checkpoints import load_optimiser, optimiser_tensors, under
from ..costs import KINDS, peak_memory
from ..errors import ArtefactError, ConfigError, NonFiniteError
from ..files import read_metadata, read_tensors, write_json, write_tensors
from ..provenance import sampled_identity, versions
from ..structuring import plain
from .evaluation import best_of
from .policy import Policy
from .settings import TrainSettings

if TYPE_CHECKING:
    from .evaluation import Gallery
    from .problem import TrainingMethod, TrainProblem

STATE, RECORD, BEST = "state.safetensors", "train.json", "best"

CHANGEABLE = ("learning_rate", "clip_norm", "ema_decay")
"""Of the settings of a training, those that another session of the same run may change."""


@attrs.define(eq=False)
class TrainingRecord:
    """A run so far: ``settings`` are all that decides it; ``history`` has one entry an update, ``evaluations`` one each
    time the averaged weights were sampled; ``passes`` (of all processes) and ``seconds`` are the updates' alone, over
    all sessions. ``changes``: what a later session set anew, ``{"after": UPDATES, NAME: [BEFORE, NOW]}``; ``settings``
    are those of the last one."""

    settings: dict[str, Any]
    history: list[dict[str, float | None]] = attrs.field(factory=list)
    evaluations: list[dict[str, Any]] = attrs.field(factory=list)
    passes: Counter[str] = attrs.field(factory=Counter)
    seconds: float = 0.0
    changes: list[dict[str, Any]] = attrs.field(factory=list)

    @classmethod
    def about(
        cls, name: str, method: TrainingMethod, plan: TrainSettings, problem: TrainProblem, gallery: Gallery,
        prompts: Sequence[str],
    ) -> Self:  # fmt: skip
        """The record of a run that has not begun."""
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

    def continued(self, now: TrainingRecord, updates: int, folder: Path) -> None:
        """Take what the next session, of a run of ``updates`` in all, has set anew; warns of what has changed.

        Raises :class:`ConfigError` for settings of another run, for fewer updates than were done, and for changes
        where no update is left that they could hold for.
        """
        if updates < self.updates:
            raise ConfigError(
                f"{str(folder)!r} holds a run of {self.updates} updates, and updates is {updates}; ask for "
                f"{self.updates} or more, or choose another folder."
            )
        before, after = self.settings["training"], now.settings["training"]
        changed = {name: [before[name], after[name]] for name in CHANGEABLE if before[name] != after[name]}
        if updates == self.updates:
            changed = {}
        set_anew = {name: new for name, (_, new) in changed.items()}
        check_same({**self.settings, "training": {**before, **set_anew}}, now.settings, folder)
        if changed:
            told = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in changed.items())
            warnings.warn(f"{told}, for all updates after {self.updates}.", RuntimeWarning, stacklevel=2)
            self.settings = now.settings
            self.changes.append({"after": self.updates, **changed})

    def due(self, number: int, plan: TrainSettings) -> bool:
        """Whether the weights after ``number`` updates are to be evaluated and were not yet."""
        wanted = number % plan.evaluate_every == 0 or number == plan.updates
        return wanted and not (self.evaluations and self.evaluations[-1]["update"] == number)

    def check_evaluated(self, names: Sequence[str], folder: Path) -> None:
        """:class:`ConfigError` where what was evaluated so far is not what will be."""
        if self.evaluations and set(before := list(self.evaluations[0]["scores"])) != set(names):
            raise ConfigError(
                f"{str(folder)!r} holds a run evaluated by {', '.join(before)}, now by {', '.join(names)}. Give the "
                "same held-out rewards and judges, or choose another folder."
            )

    def add(self, figures: dict[str, float], passes: Counter[str], seconds: float) -> None:
        """One more update; a figure that is not finite is None, which JSON has a word for."""
        self.history.append({name: figure if math.isfinite(figure) else None for name, figure in figures.items()})
        self.passes.update(passes)
        self.seconds += seconds

    def cost(self) -> dict[str, float]:
        """JSON-able: passes by kind (only kinds that ran), ``seconds``, ``peak_memory`` in bytes."""
        ran = {kind: self.passes[kind] for kind in KINDS if self.passes[kind]}
        return {**ran, "seconds": round(self.seconds, 3), "peak_memory": peak_memory()}

    def write(self, folder: Path) -> None:
        """``train.json``, and ``training.png`` once there is something to draw."""
        from .plots import training_curves

        write_json(folder / RECORD, {
            "settings": self.settings, "seed": self.settings["seed"], "versions": versions(), "cost": self.cost(),
            "changes": self.changes, "updates": self.updates, "best_update": self.best["update"],
            "evaluations": self.evaluations, "history": self.history,
        })  # fmt: skip
        if len(self.evaluations) > 1:
            training_curves(self.evaluations, folder / "training.png")


@attrs.define(eq=False)
class TrainingState:
    """Everything that moves: the policy's numbers, their averages, the old policy's, the optimiser's. ``saved``: after
    how many updates they were written last, None where there is no checkpoint."""

    folder: Path
    policy: Policy
    old: Policy | None
    optimiser: torch.optim.Optimizer
    decay: float
    averages: Policy
    saved: int | None = None

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
        self.saved = record.updates

    @contextmanager
    def telling_what_is_kept(self) -> Iterator[None]:
        """Add to a :class:`NonFiniteError` where the run can go on from."""
        try:
            yield
        except NonFiniteError as error:
            if self.saved is None:
                raise
            raise NonFiniteError(
                f"{error} The last checkpoint, after update {self.saved}, is kept: a rerun goes on from it, with a "
                "lower learning_rate if you give one."
            ) from error

    def save_best(self, write: bool) -> None:
        """Write the averaged weights to ``best``, in the place of what was there. All processes call it, see
        :meth:`save`."""
        place = self.folder / BEST
        partial = place.with_name(f"{BEST}.partial")
        self.averages.save(partial, write=write)
        if write:
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)

    def restore(self, record: TrainingRecord, updates: int) -> TrainingRecord:
        """Take the checkpoint of the same run, if there is one, and return its record; ``updates`` are the run's now.

        Raises :class:`ConfigError` for another run's, naming what differs, and what :meth:`TrainingRecord.continued`
        does; :class:`ArtefactError` for a checkpoint that is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return record
        try:
            kept, tensors = json.loads(read_metadata(path)["record"]), read_tensors(path)
        except (ArtefactError, KeyError, ValueError) as error:
            raise ArtefactError(
                f"the checkpoint {str(path)!r} is damaged or not a training's ({error}). Put back a copy of it, or "
                "delete it to train from the beginning."
            ) from error
        found = TrainingRecord(**{**kept, "passes": Counter(kept["passes"])})
        found.continued(record, updates, self.folder)
        self.saved = found.updates
        self.policy.load(under("policy", tensors))
        self.averages.load(under("average", tensors))
        if self.old is not None:
            self.old.load(under("old", tensors))
        load_optimiser(self.optimiser, tensors)
        return found
