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
from typing import Any, Literal

import attrs
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone
from .conditions import Condition
from .errors import ArtefactError, ConfigError, NonFiniteError
from .examples import CONDITION, Examples
from .files import read_metadata, read_tensors, write_tensors
from .progress import track
from .reward import Reward, RewardOutput
from .seeds import stream_seed
from .value import Branch, StitchedValue

positive: Any = attrs.validators.gt(0)
share: Any = [attrs.validators.ge(0), attrs.validators.le(1)]


@attrs.frozen
class FinetuneSettings:
    """The recipe; the defaults are the paper's (CLIP and HPSv2 form of the loss), but for ``steps`` (the paper counts 5
    epochs), ``clip_norm`` and the exact noise distribution, which it does not give.

    ``score_weight`` counts where examples have a score: rewards that need no condition, and samples drawn for a prompt.
    ``layer_multiplier`` scales the stitching layer's learning rate; ``schedule`` is what follows the warm-up;
    ``noise`` the distribution of sigma on [0, 1] (``logit-normal`` is centre-biased); ``generated`` the share of each
    batch drawn from the backbone's own samples; ``checkpoint_every`` counts steps.
    """

    steps: int = attrs.field(default=2000, validator=positive)
    batch_size: int = attrs.field(default=128, validator=positive)
    learning_rate: float = attrs.field(default=1e-5, validator=positive)
    layer_multiplier: float = attrs.field(default=5.0, validator=positive)
    weight_decay: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    warmup_steps: int = attrs.field(default=100, validator=attrs.validators.ge(0))
    schedule: Literal["constant", "cosine"] = attrs.field(
        default="constant", validator=attrs.validators.in_(("constant", "cosine"))
    )
    noise: Literal["logit-normal", "uniform"] = attrs.field(
        default="logit-normal", validator=attrs.validators.in_(("logit-normal", "uniform"))
    )
    embedding_weight: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    token_weight: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    score_weight: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    score_loss: Literal["squared", "smooth-l1"] = attrs.field(
        default="squared", validator=attrs.validators.in_(("squared", "smooth-l1"))
    )
    clip_norm: float = attrs.field(default=1.0, validator=positive)
    generated: float = attrs.field(default=0.0, validator=share)
    mixed_precision: Literal["no", "bf16", "fp16"] = attrs.field(
        default="no", validator=attrs.validators.in_(("no", "bf16", "fp16"))
    )
    checkpoint_every: int = attrs.field(default=100, validator=positive)
    seed: int = 0


def draw_sigma(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """``[count]`` noise levels in (0, 1)."""
    return (
        torch.rand(count, generator=generator)
        if kind == "uniform"
        else torch.randn(count, generator=generator).sigmoid()
    )


def distillation_loss(
    output: RewardOutput, target: Mapping[str, Tensor], settings: FinetuneSettings, score: Tensor | None = None
) -> Tensor:
    """Squared l2 between normalised embeddings, plus tokens (mean over tokens, per channel), plus the error of
    ``score [B]``.

    Only the squared score error has ``E[r(z0) | z_t]`` as its minimiser (paper, L_value); the paper's aesthetic recipe
    takes Smooth-l1. The token term is divided by the width, so that its weight means the same for narrow and wide
    towers. ``score`` may cover fewer examples than the rest: those whose target has one (is no NaN), in their order.
    """
    embedding = F.normalize(output.embedding.float(), dim=-1) - F.normalize(target["embedding"], dim=-1)
    loss = settings.embedding_weight * embedding.square().sum(-1).mean()
    loss = loss + settings.token_weight * F.mse_loss(output.tokens.float(), target["tokens"])
    if score is not None:
        error = F.mse_loss if settings.score_loss == "squared" else F.smooth_l1_loss
        known = target["score"]
        loss = loss + settings.score_weight * error(score.float(), known[~known.isnan()])
    return loss


def predicted_score(reward: Reward, output: RewardOutput, target: Mapping[str, Tensor]) -> Tensor | None:
    """The scores of the examples whose target has one, against the condition it was read with; None if none has."""
    if "score" not in target or bool(target["score"].isnan().all()):
        return None
    rows = ~target["score"].isnan()
    condition = {key.removeprefix(CONDITION): t[rows] for key, t in target.items() if key.startswith(CONDITION)}
    score = None if output.score is None else output.score[rows]
    return reward.score(RewardOutput(output.tokens[rows], output.embedding[rows], score), Condition(condition))


def finetune(
    value: StitchedValue,
    images: Examples | None,
    settings: FinetuneSettings,
    *,
    samples: Examples | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train a value model's branches in place and return the loss of every step.

    ``images`` and ``samples`` are caches of real and generated examples; ``settings.generated`` says how they mix.
    With a ``checkpoint`` folder the state is saved there every ``checkpoint_every`` steps, and a run that finds one
    goes on from it.

    Raises ``ConfigError`` when the mix asks for a cache that is missing, ``ArtefactError`` for another recipe's
    checkpoint, :class:`NonFiniteError` when the loss is not finite (the last checkpoint stays).
    """
    sources = _mix(images, samples, settings)
    accelerator = Accelerator(cpu=value.device.type == "cpu", mixed_precision=settings.mixed_precision)
    optimiser = _optimiser(value, settings)
    step_module, optimiser = accelerator.prepare(_Branches(value), optimiser)
    state = _Checkpoint(checkpoint, value, optimiser, settings)
    losses = state.restore()
    value.train()
    value.head.eval()
    for step in track(range(len(losses), settings.steps), "finetune", settings.steps - len(losses), progress):
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * _schedule(step, settings)
        batch = _batch(value, sources, settings, step, accelerator.process_index, accelerator.num_processes)
        with torch.no_grad():
            features = value.features(batch.pop("noisy"), batch.pop("sigma"))
        with accelerator.autocast():
            loss = step_module(features, batch, settings)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(step_module.parameters(), settings.clip_norm)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(
                f"the loss is {losses[-1]} at step {step}; lower the learning rate. The last checkpoint is kept."
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        due = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps
        if due and accelerator.is_main_process:
            state.save(losses)
    value.eval()
    return losses


class _Branches(nn.Module):
    """The trainable half as one module with one ``forward``, which is what DDP and FSDP wrap."""

    def __init__(self, value: StitchedValue) -> None:
        super().__init__()
        self.names = value.names
        self.branches = value.branches

    def forward(self, features: Tensor, targets: Mapping[str, Tensor], settings: FinetuneSettings) -> Tensor:
        losses = []
        for name, branch in zip(self.names, self.branches, strict=True):
            own = {key.removeprefix(f"{name}/"): t for key, t in targets.items() if key.startswith(f"{name}/")}
            assert isinstance(branch, Branch) and isinstance(branch.tail.part, Reward)
            output = branch(features)
            score = predicted_score(branch.tail.part, output, own)
            losses.append(distillation_loss(output, own, settings, score))
        return torch.stack(losses).sum()


def _optimiser(value: StitchedValue, settings: FinetuneSettings) -> torch.optim.Optimizer:
    branches = [branch for branch in value.branches if isinstance(branch, Branch)]
    layers = [p for branch in branches for p in branch.layer.parameters()]
    tails = [p for branch in branches for p in branch.tail.parameters() if p.requires_grad]
    groups = [
        {"params": layers, "base": settings.learning_rate * settings.layer_multiplier},
        {"params": tails, "base": settings.learning_rate},
    ]
    fused = value.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def _schedule(step: int, settings: FinetuneSettings) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def _mix(images: Examples | None, samples: Examples | None, settings: FinetuneSettings) -> list[tuple[Examples, float]]:
    mix = [(images, 1 - settings.generated), (samples, settings.generated)]
    for (examples, part), name in zip(mix, ("real images", "generated samples"), strict=True):
        if part > 0 and examples is None:
            raise ConfigError(f"the recipe takes {part:.0%} of its latents from {name}, but none were given.")
    return [(examples, part) for examples, part in mix if examples is not None and part > 0]


def _batch(
    value: StitchedValue,
    sources: list[tuple[Examples, float]],
    settings: FinetuneSettings,
    step: int,
    rank: int,
    world: int,
) -> dict[str, Tensor]:
    """Step ``step``'s noisy latents, levels and targets; each process takes its own share of the same global batch."""
    generator = torch.Generator().manual_seed(stream_seed(settings.seed, step))
    sizes = [round(part * settings.batch_size) for _, part in sources]
    sizes[0] += settings.batch_size - sum(sizes)
    parts = []
    for (examples, _), size in zip(sources, sizes, strict=True):
        rows = torch.randint(len(examples), (size,), generator=generator).tolist()
        parts.append(examples.read(rows))
    batch = join_sources(parts)
    sigma = draw_sigma(settings.noise, settings.batch_size, generator)
    noise = torch.randn(batch["latents"].shape, generator=generator)
    backbone = value.head.part
    assert isinstance(backbone, Backbone)
    noisy = backbone.path.add_noise(batch.pop("latents"), noise, sigma)
    whole = {"noisy": noisy, "sigma": sigma, **batch}
    return {name: tensor[rank::world].to(value.device) for name, tensor in whole.items()}


def join_sources(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of several sources as one batch. What a source lacks (a photograph was drawn for no prompt) is NaN, so
    that using it by mistake would show in the loss."""
    columns = {name: tensor for part in parts for name, tensor in part.items()}
    sizes = [len(part["latents"]) for part in parts]
    return {
        name: torch.cat(
            [
                part.get(name, like.new_full((size, *like.shape[1:]), torch.nan))
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for name, like in columns.items()
    }


class _Checkpoint:
    """The state of a run in a folder: ``state.safetensors`` and the losses, swapped in whole."""

    def __init__(
        self, folder: Path | None, value: StitchedValue, optimiser: torch.optim.Optimizer, settings: FinetuneSettings
    ) -> None:
        self.folder, self.value, self.optimiser, self.settings = folder, value, optimiser, settings

    def _recipe(self) -> dict[str, Any]:
        kept = attrs.asdict(self.settings)
        kept.pop("checkpoint_every")
        return kept

    def save(self, losses: list[float]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": t for name, t in self.value.branches.state_dict().items()}
        for index, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": torch.as_tensor(t) for key, t in entry.items()}
        metadata = {"losses": json.dumps(losses), "recipe": json.dumps(self._recipe())}
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
        self.value.branches.load_state_dict(
            {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        return list(json.loads(metadata["losses"]))
