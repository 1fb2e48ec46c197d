"""Stage 2: distil the clean reward into the stitched model on noisy latents (paper, section 3).

Everything random in step ``n`` (rows, noise levels, noise) is drawn from a generator seeded with ``(seed, n)``. A
checkpoint of parameters, optimiser and step number is therefore all that a killed run needs to end in the same
weights, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from torch import Tensor, nn

from ..backbone import Backbone
from ..branch import Branch
from ..checkpoints import under
from ..conditions import Condition
from ..costs import count
from ..errors import ArtefactError, ConfigError, NonFiniteError
from ..files import read_metadata, read_tensors, write_tensors
from ..processes import join_group
from ..progress import track
from ..reward import Reward
from ..value import StitchedValue
from .batches import GROUP, Batches, share_of
from .examples import IMAGES, PROMPT, Examples
from .finetune_settings import FinetuneSettings
from .levels import LevelBalance, unweighted
from .objectives import distillation_loss, hidden_loss, predicted_score, ranking_loss
from .optimisers import Optimisers
from .texts import Texts

_HIDDEN, _BIN = "hidden.", "bin"
"""Columns of a batch: a reward's clean tokens after each block (``REWARD/hidden.NUMBER``); a noise level's bin."""


def finetune(
    value: StitchedValue,
    images: Examples | None,
    settings: FinetuneSettings,
    *,
    samples: Examples | None = None,
    prompts: Condition | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train a value model's branches in place and return the loss of every step.

    ``images`` and ``samples`` are caches of real and generated examples; ``settings.generated`` says how they mix.
    ``prompts`` is the backbone's condition of all prompts that samples were drawn for, in their order; only a recipe
    with ``prompted`` needs it.
    With a ``checkpoint`` folder the state is saved there every ``checkpoint_every`` steps, and a run that finds one
    goes on from it.

    Raises ``ConfigError`` when the recipe asks for a cache, its images or prompts that are missing,
    ``ArtefactError`` for another recipe's checkpoint, :class:`NonFiniteError` when the loss is not finite (the last
    checkpoint stays).
    """
    backbone = value.head.part
    assert isinstance(backbone, Backbone)
    batches = Batches.of(backbone, images, samples, settings)
    if settings.prompted and prompts is None:
        raise ConfigError("the recipe reads samples under the prompts they were drawn for; pass prompts.")
    texts = Texts.of(value.null, prompts)
    # Accelerate keeps the precision that a process began with, so this one is set aside for the recipe's own
    accelerator = join_group(
        value.device,
        # a tail keeps its tower's positions, which only some recipes read
        [AutocastKwargs(enabled=False), DistributedDataParallelKwargs(find_unused_parameters=True)],
        mixed_precision=None,
    )
    precision = _Precision(value.device.type, settings.mixed_precision)
    optimisers, step_module = Optimisers.of(value, settings), accelerator.prepare_model(_Branches(value))
    balance = _balance(value, settings) if settings.balance_levels else None
    state = _Checkpoint(checkpoint, value, optimisers, precision.scaler, balance, settings)
    losses = state.restore()
    value.train()
    value.head.eval()
    for step in track(range(len(losses), settings.steps), "finetune", settings.steps - len(losses), progress):
        optimisers.scale_rates(_schedule(step, settings))
        batch, weight = _own_share(batches(step), accelerator, value.device)
        with torch.no_grad(), precision.autocast():
            if balance is not None:
                batch[_BIN] = balance.bins(batch["sigma"], batch[PROMPT] >= 0)
            read = texts.read(batch.pop(PROMPT), value.device) if settings.prompted else None
            features = value.features(batch.pop("noisy"), batch.pop("sigma"), read)
            batch |= _clean_states(value, batch.pop(IMAGES, None)) if settings.hidden_weight else {}
        with precision.autocast():
            loss = step_module(features, batch, settings, balance)
        precision.scaler.scale(loss * weight).backward()
        optimisers.unscale(precision.scaler)
        torch.nn.utils.clip_grad_norm_(step_module.parameters(), settings.clip_norm)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(
                f"the loss is {losses[-1]} at step {step}; lower the learning rate. The last checkpoint is kept."
            )
        optimisers.step(precision.scaler)
        if balance is not None:
            balance.update(accelerator)
        due = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps
        if due and accelerator.is_main_process:
            state.save(losses)
    value.eval()
    return losses


def _clean_states(value: StitchedValue, images: Tensor | None) -> dict[str, Tensor]:
    """The tokens ``[B, N, C]`` of judged images ``[B, 3, H, W]`` after each block that a tail runs, as
    ``REWARD/hidden.NUMBER``."""
    if images is None:
        raise ConfigError("the recipe's hidden_weight compares with the images themselves, but the cache kept none.")
    found: dict[str, Tensor] = {}
    count("reward", len(images) * len(value.names))
    for name in value.names:
        reward, cut = value.reward(name), value.interface(name).j - 1
        state = reward.head(reward.preprocess(images.float() / 255), None, cut)
        found |= {f"{name}/{_HIDDEN}{n}": t.float() for n, t in enumerate(reward.hidden_states(state, cut)[1])}
    return found


def _own_share(
    whole: Mapping[str, Tensor], accelerator: Accelerator, device: torch.device
) -> tuple[dict[str, Tensor], float]:
    """A process' rows of the global batch, and what its loss counts, relative to the others', in their mean."""
    rows = share_of(whole[GROUP], accelerator.process_index, accelerator.num_processes)
    weight = len(rows) * accelerator.num_processes / len(whole[GROUP])
    return {name: tensor[rows].to(device) for name, tensor in whole.items()}, weight


def _balance(value: StitchedValue, settings: FinetuneSettings) -> LevelBalance:
    terms = ("embedding", "tokens", *(("hidden",) if settings.hidden_weight else ()))
    return LevelBalance.of([f"{name}/{term}" for name in value.names for term in terms], value.device)


class _Precision:
    """Of one finetune: autocast to its type, and the scaling of losses that fp16 needs."""

    def __init__(self, device: str, name: str) -> None:
        self.device, self.low = device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler(device, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.low, enabled=self.low is not None)


class _Branches(nn.Module):
    """The trainable half as one module with one ``forward``, which is what DDP and FSDP wrap."""

    def __init__(self, value: StitchedValue) -> None:
        super().__init__()
        self.names = value.names
        self.branches = value.branches

    def forward(
        self,
        features: Tensor,
        targets: Mapping[str, Tensor],
        settings: FinetuneSettings,
        balance: LevelBalance | None = None,
    ) -> Tensor:
        losses = []
        for name, branch in zip(self.names, self.branches, strict=True):
            own = {key.removeprefix(f"{name}/"): t for key, t in targets.items() if key.startswith(f"{name}/")}
            assert isinstance(branch, Branch) and isinstance(branch.tail.part, Reward)
            output, hidden = branch(features, return_hidden=True) if settings.hidden_weight else (branch(features), [])
            weigh = unweighted if balance is None else balance.weigher(name, targets[_BIN])
            if hidden:
                clean = [own[f"{_HIDDEN}{n}"] for n in range(len(hidden))]
                losses.append(settings.hidden_weight * hidden_loss(hidden, clean, weigh))
            score = predicted_score(branch.tail.part, output, own)
            losses.append(distillation_loss(output, own, settings, score, weigh))
            if settings.rank_weight and score is not None and GROUP in targets:
                losses.append(settings.rank_weight * ranking_loss(score, own["score"], targets[GROUP]))
        return torch.stack(losses).sum()


def _schedule(step: int, settings: FinetuneSettings) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


class _Checkpoint:
    """The state of a run in a folder: ``state.safetensors`` and the losses, swapped in whole."""

    def __init__(
        self,
        folder: Path | None,
        value: StitchedValue,
        optimisers: Optimisers,
        scaler: torch.amp.GradScaler,
        balance: LevelBalance | None,
        settings: FinetuneSettings,
    ) -> None:
        self.folder, self.value, self.settings = folder, value, settings
        self.optimisers, self.scaler, self.balance = optimisers, scaler, balance

    def _recipe(self) -> dict[str, Any]:
        kept = attrs.asdict(self.settings)
        kept.pop("checkpoint_every")
        return kept

    def save(self, losses: list[float]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": t for name, t in self.value.branches.state_dict().items()}
        tensors |= self.optimisers.tensors()
        if self.balance is not None:
            tensors["levels"] = self.balance.means
        told = {"losses": losses, "recipe": self._recipe(), "scaler": self.scaler.state_dict()}
        metadata = {name: json.dumps(content) for name, content in told.items()}
        write_tensors(self.folder / "state.safetensors", tensors, metadata)

    def restore(self) -> list[float]:
        path = None if self.folder is None else self.folder / "state.safetensors"
        if path is None or not path.exists():
            return []
        tensors, metadata = read_tensors(path), read_metadata(path)
        if json.loads(metadata["recipe"]) != self._recipe():
            raise ArtefactError(
                f"{str(path)!r} belongs to a run with another recipe. Delete it or choose another folder."
            )
        self.value.branches.load_state_dict(under("model", tensors))
        self.optimisers.load(tensors)
        if scaling := json.loads(metadata.get("scaler", "{}")):
            self.scaler.load_state_dict(scaling)
        if self.balance is not None:
            self.balance.means = tensors["levels"].to(self.balance.means)
        return list(json.loads(metadata["losses"]))
