"""How much of the clean reward's skill survives on noisy latents: retrieval recall@1 by noise level (paper, section
4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from .backbone import Backbone
from .conditions import Condition
from .errors import ConfigError
from .loading import load_backbone, name_of
from .progress import track
from .reward import Reward
from .sampling import seeded_noise
from .seeds import stream_seed
from .value import StitchedValue

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The paper's noise levels."""


@attrs.frozen
class Recall:
    """Recall@1 in [0, 1]: image to text, text to image, and their mean."""

    image_to_text: float
    text_to_image: float

    @property
    def mean(self) -> float:
        return (self.image_to_text + self.text_to_image) / 2


def recall_at_one(images: Tensor, texts: Tensor, captions: Sequence[str]) -> Recall:
    """Recall@1 of ``images [N, D]`` and ``texts [N, D]``, matched row by row; both are normalised here.

    Rows that share a caption are each other's right answers.
    """
    similarity = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    number = {caption: n for n, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([number[caption] for caption in captions])
    forward = own[similarity.argmax(1).cpu()] == own
    backward = own[similarity.argmax(0).cpu()] == own
    return Recall(float(forward.float().mean()), float(backward.float().mean()))


@torch.no_grad()
def encode_batches(backbone: Backbone, images: Tensor, batch: int) -> Tensor:
    """Clean latents of ``images [N, 3, H, W]`` in [0, 1], on the CPU."""
    return torch.cat([backbone.encode_images(part.to(backbone.device)).cpu() for part in images.split(batch)])


@torch.no_grad()
def noisy_embeddings(
    value: StitchedValue, latents: Tensor, sigma: float, *, batch: int = 64, seed: int = 0, name: str | None = None
) -> Tensor:
    """``[N, D]``: the stitched embeddings of clean ``latents`` noised to ``sigma``; row ``n``'s noise comes from
    ``(seed, n)``."""
    backbone = value.head.part
    assert isinstance(backbone, Backbone)
    parts = []
    for start in range(0, len(latents), batch):
        clean = latents[start : start + batch]
        noise = seeded_noise([stream_seed(seed, start + row) for row in range(len(clean))], clean.shape[1:], "cpu")
        noisy = backbone.path.add_noise(clean, noise, sigma).to(value.device)
        parts.append(value.outputs(noisy, sigma)[name or value.names[0]].embedding.cpu())
    return torch.cat(parts)


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

    def retention(self, name: str) -> list[float]:
        """A model's recall as a share of the clean reward's, by noise level."""
        return [recall.mean / self.clean.mean for recall in self.models[name]]


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
    texts = _texts(reward.condition(list(captions)))
    clean = torch.cat([reward.judge(part.to(reward.device)).embedding for part in images.split(batch)])
    latents = encode_batches(backbone, images, batch)
    pairs = [(name, sigma) for name in models for sigma in sigmas]
    recalls: dict[str, list[Recall]] = {name: [] for name in models}
    for name, sigma in track(pairs, "retrieval", len(pairs), progress):
        branch = _branch(models[name], reward)
        embeddings = noisy_embeddings(models[name], latents, sigma, batch=batch, seed=seed, name=branch)
        recalls[name].append(recall_at_one(embeddings, texts.cpu(), captions))
    return Retrieval(
        tuple(sigmas), recall_at_one(clean.cpu(), texts.cpu(), captions),
        {name: tuple(found) for name, found in recalls.items()}, len(captions),
    )  # fmt: skip


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
