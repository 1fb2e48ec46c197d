"""The one training loop of all models here: resumable after a kill, bit for bit, with averaged weights."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn
from tqdm import tqdm


class Task(Protocol):
    """What is trained: named modules and the loss of one batch."""

    modules: dict[str, nn.Module]

    def optimizers(self) -> list[torch.optim.Optimizer]: ...

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The scalar loss of batch `step` and numbers to log; random draws come from `generator` or torch's seed."""
        ...


@attrs.frozen
class Schedule:
    """Warm-up, plateau, and linear decay to zero over the last `decay` part of `steps`.

    As long as the decay has not begun, `steps` may be changed without changing what has been trained already.
    """

    steps: int
    warmup: int = 200
    decay: float = 0.5

    def __call__(self, step: int) -> float:
        """The factor on the learning rate at `step`, 0 .. 1."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return max(0.0, rise * fall)


@attrs.frozen
class Settings:
    """How a loop runs; `folder` holds its checkpoint and log."""

    name: str
    folder: Path
    schedule: Schedule
    seed: int = 0
    ema: float = 0.995
    clip: float = 1.0
    save_seconds: float = 60.0


@attrs.define
class Progress:
    """Where a run stands: finished steps and the seconds spent training in all its lives."""

    step: int = 0
    seconds: float = 0.0


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def _average(averages: dict[str, Tensor], modules: dict[str, nn.Module], decay: float) -> None:
    for name, parameter in _named(modules):
        averages[name].lerp_(parameter.detach(), 1 - decay)


def _named(modules: dict[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}/{name}", parameter


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


class Loop:
    """Trains a task for `settings.schedule.steps` steps, from its checkpoint if there is one."""

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task = task
        self.settings = settings
        self.optimizers = task.optimizers()
        self.rates = [[group["lr"] for group in opt.param_groups] for opt in self.optimizers]
        self.averages = {name: p.detach().clone() for name, p in _named(task.modules)}
        self.progress = Progress()
        self.log: list[dict[str, float]] = []
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.settings.folder / f"{self.settings.name}.pt"

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        for name, module in self.task.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.averages = state["averages"]
        self.progress = Progress(state["step"], state["seconds"])
        self.log = state["log"]

    def save(self) -> None:
        """Write the checkpoint and the log, atomically."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.task.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": self.averages,
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "log": self.log,
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        text = json.dumps({"step": self.progress.step, "seconds": self.progress.seconds, "log": self.log})
        write_atomically(self.checkpoint.with_suffix(".json"), lambda path: path.write_text(text))

    def _update(self, step: int) -> tuple[float, dict[str, float]]:
        factor = self.settings.schedule(step)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        # Each step is seeded by its number, so a resumed run draws what the uninterrupted one would have drawn.
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        loss, numbers = self.task.loss(step, generator)
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise NonFiniteLossError(
                f"{self.settings.name}: loss is {value} at step {step}; the last checkpoint is kept"
            )
        loss.backward()
        parameters = [p for _, p in _named(self.task.modules) if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # A young average follows closely, or it would keep the random start for thousands of steps.
        _average(self.averages, self.task.modules, min(self.settings.ema, (1 + step) / (10 + step)))
        return value, numbers

    def run(self, stop: int | None = None) -> None:
        """Train until step `stop` (the schedule's end if None), saving about once a minute and at the end."""
        end = self.settings.schedule.steps if stop is None else stop
        for module in self.task.modules.values():
            module.train()
        saved = began = time.monotonic()
        before = self.progress.seconds
        window: dict[str, list[float]] = {}
        bar = tqdm(total=end, initial=self.progress.step, desc=self.settings.name, mininterval=2.0)
        while self.progress.step < end:
            value, numbers = self._update(self.progress.step)
            self.progress.step += 1
            self.progress.seconds = before + time.monotonic() - began
            for key, number in {"loss": value, **numbers}.items():
                window.setdefault(key, []).append(number)
            if self.progress.step % 100 == 0:
                means = {key: sum(n) / len(n) for key, n in window.items()}
                self.log.append({"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **means})
                bar.set_postfix({key: f"{mean:.4f}" for key, mean in means.items()}, refresh=False)
                window.clear()
            bar.update()
            if time.monotonic() - saved > self.settings.save_seconds:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()
        for module in self.task.modules.values():
            module.eval()

    def use_average(self) -> None:
        """Put the averaged weights into the modules, for evaluation and export; do not train on after this."""
        with torch.no_grad():
            for name, parameter in _named(self.task.modules):
                parameter.copy_(self.averages[name])


def averaged(checkpoint: Path, modules: dict[str, nn.Module]) -> Progress:
    """Fill `modules` from a checkpoint, averaged weights first, and say how far it was trained."""
    state = torch.load(checkpoint, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(state["averages"][f"{name}/{key}"])
        module.eval()
    return Progress(state["step"], state["seconds"])
