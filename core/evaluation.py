"""Reading clean rewards on images and value models on noisy latents, level by level; retrieval recall@1 by noise level
(paper, section 4). Other metrics: :mod:`stitchvm.core.skills`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from .backbone import Backbone
from .conditions import Condition
from .errors import ConfigError
from .loading import load_backbone
from .metrics import Recall, recall_at_one, share_kept
from .progress import track
from .records import name_of
from .reward import Reward, RewardOutput
from .sampling import seeded_noise
from .seeds import stream_seed
from .value import StitchedValue

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The paper's noise levels."""


Reader = Callable[[Reward, RewardOutput, slice], Tensor]
"""``(scorer, output, rows) -> [B, ...]``: what is kept of a reward's or tail's output on these rows."""
Readings = tuple[Tensor, ...]
"""One reading ``[N, ...]`` a set of pictures."""
M = TypeVar("M")


def embedding(scorer: Reward, output: RewardOutput, rows: slice) -> Tensor:
    """A :data:`Reader` that keeps the embedding ``[B, D]``."""
    return output.embedding


@torch.no_grad()
def encode_batches(backbone: Backbone, images: Tensor, batch: int) -> Tensor:
    """Clean latents of ``images [N, 3, H, W]``, uint8 or in [0, 1], on the CPU."""
    return torch.cat([backbone.encode_images(_floats(part).to(backbone.device)).cpu() for part in images.split(batch)])


@torch.no_grad()
def clean_readings(reward: Reward, images: Tensor, read: Reader, batch: int = 64) -> Tensor:
    """What ``read`` keeps of the clean reward on ``images [N, 3, H, W]``, uint8 or in [0, 1], on the CPU."""
    parts = []
    for start in range(0, len(images), batch):
        part = _floats(images[start : start + batch]).to(reward.device)
        parts.append(read(reward, reward.judge(part), slice(start, start + len(part))).cpu())
    return torch.cat(parts)


@torch.no_grad()
def noisy_readings(
    value: StitchedValue,
    latents: Tensor,
    sigma: float,
    read: Reader,
    *,
    name: str | None = None,
    batch: int = 64,
    seed: int = 0,
    stream: tuple[int, ...] = (),
) -> Tensor:
    """What ``read`` keeps of a value model's branch ``name`` on clean ``latents`` noised to ``sigma``, on the CPU; row
    ``n``'s noise comes from ``(seed, n, *stream)``."""
    backbone = value.head.part
    assert isinstance(backbone, Backbone)
    name = name or value.names[0]
    parts = []
    for start in range(0, len(latents), batch):
        clean = latents[start : start + batch]
        rows = slice(start, start + len(clean))
        seeds = [stream_seed(seed, row, *stream) for row in range(rows.start, rows.stop)]
        noisy = backbone.path.add_noise(clean, seeded_noise(seeds, clean.shape[1:], "cpu"), sigma).to(value.device)
        parts.append(read(value.scorer(name), value.outputs(noisy, sigma)[name], rows).cpu())
    return torch.cat(parts)


def over_sigmas(
    backbone: Backbone,
    reward: Reward,
    models: Mapping[str, StitchedValue],
    pictures: Sequence[Tensor],
    read: Reader,
    measure: Callable[[Readings, Readings], M],
    *,
    sigmas: Sequence[float] = SIGMAS,
    batch: int = 64,
    seed: int = 0,
    label: str = "evaluate",
    progress: bool = True,
) -> tuple[M, dict[str, tuple[M, ...]]]:
    """``measure(readings, clean)`` of the clean reward on every set of ``pictures [N, 3, H, W]`` (uint8 or in [0, 1]),
    and of every model on their latents at every sigma; ``clean`` are always the clean reward's readings.

    Row ``n``'s noise comes from ``(seed, n)`` in the first set and from ``(seed, n, k)`` in set ``k`` after it.
    """
    branches = {name: _branch(model, reward) for name, model in models.items()}
    clean = tuple(clean_readings(reward, part, read, batch) for part in pictures)
    latents = [encode_batches(backbone, part, batch) for part in pictures]
    pairs = [(name, sigma) for name in models for sigma in sigmas]
    found: dict[str, list[M]] = {name: [] for name in models}
    for name, sigma in track(pairs, label, len(pairs), progress):
        readings = tuple(
            noisy_readings(
                models[name], part, sigma, read, name=branches[name], batch=batch, seed=seed,
                stream=(number,) if number else (),
            )
            for number, part in enumerate(latents)
        )  # fmt: skip
        found[name].append(measure(readings, clean))
    return measure(clean, clean), {name: tuple(measures) for name, measures in found.items()}


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


@attrs.frozen
class Retrieval:
    """Recall by noise level, of the clean reward and of one or more value models."""

    sigmas: tuple[float, ...]
    clean: Recall
    models: dict[str, tuple[Recall, ...]]
    count: int

    def report(self) -> dict[str, Any]:
        """JSON-able: ``sigma[]``, ``clean`` and each model's list, means of both directions; the directions under
        ``detail``."""
        means = {name: [recall.mean for recall in recalls] for name, recalls in self.models.items()}
        detail = {name: [attrs.asdict(recall) for recall in recalls] for name, recalls in self.models.items()}
        return {"sigma": list(self.sigmas), "clean": self.clean.mean, **means, "count": self.count,
                "detail": {"clean": attrs.asdict(self.clean), **detail}}  # fmt: skip

    def retention(self, name: str) -> list[float | None]:
        """A model's recall as a share of the clean reward's, by noise level; None where that recalls nothing."""
        return share_kept([recall.mean for recall in self.models[name]], self.clean.mean)


@torch.no_grad()
def retrieval(
    backbone: Backbone,
    reward: Reward,
    models: dict[str, StitchedValue],
    images: Tensor,
    captions: Sequence[str],
    *,
    sigmas: Sequence[float] = SIGMAS,
    batch: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Retrieval:
    """Recall@1 among ``images [N, 3, H, W]`` and their ``captions``, on clean images and on noisy latents at every
    sigma.

    Raises :class:`ConfigError` for a reward without a text side, or when images and captions differ in number.
    """
    if reward.condition_kind != "prompts":
        raise ConfigError(
            f"retrieval needs a reward that reads prompts; {type(reward).__name__} takes {reward.condition_kind}."
        )
    if len(images) != len(captions):
        raise ConfigError(f"{len(images)} images but {len(captions)} captions.")
    texts = _texts(reward.condition(list(captions))).cpu()
    clean, recalls = over_sigmas(
        backbone, reward, models, [images], embedding, lambda found, _: recall_at_one(found[0], texts, captions),
        sigmas=sigmas, batch=batch, seed=seed, label="retrieval", progress=progress,
    )  # fmt: skip
    return Retrieval(tuple(sigmas), clean, recalls, len(captions))


def _branch(value: StitchedValue, reward: Reward) -> str:
    """Which of a value model's branches stands for ``reward``: the one of its name, or the only one."""
    if name_of(reward) in value.names:
        return name_of(reward)
    if len(value.names) == 1:
        return value.names[0]
    raise ConfigError(f"this value model reads {', '.join(value.names)}, not {name_of(reward)}.")


def chosen_reward(value: StitchedValue, name: str | None) -> Reward:
    """The reward to measure a value model by: the named one, or its only one.

    Raises :class:`ConfigError` when there are several and none is named, or for one it does not read.
    """
    if (name is None and len(value.names) > 1) or (name is not None and name not in value.names):
        asked = "say which" if name is None else f"{name!r} is none of them"
        raise ConfigError(f"this value model reads {', '.join(value.names)}; {asked}, one reward at a time.")
    return value.reward(name)


def _texts(condition: Condition) -> Tensor:
    if "text" not in condition.tensors:
        raise ConfigError("retrieval needs the reward's condition to hold its text embeddings under 'text'.")
    return condition["text"]


def evaluate(
    value: StitchedValue,
    *,
    images: Tensor,
    captions: Sequence[str],
    backbone: str | Backbone | None = None,
    reward: str | None = None,
    sigmas: Sequence[float] = SIGMAS,
    batch: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Retrieval:
    """:func:`retrieval` of one value model, under the name ``stitched``; ``backbone`` (default: its own) encodes the
    images, ``reward`` says which of several is measured."""
    judge = chosen_reward(value, reward)
    record = value.head.part.record
    encoder = load_backbone(backbone if backbone is not None else record.name)
    return retrieval(
        encoder, judge, {"stitched": value}, images, captions, sigmas=sigmas, batch=batch, seed=seed,
        progress=progress,
    )  # fmt: skip
