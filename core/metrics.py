"""What a reward's skill is measured by: four figures, each of the clean reward and of a value model on noisy latents.

- ``recall``: retrieval recall@1 of pictures and their captions (paper, section 4, CLIP);
- ``preference``: the share of pairs in which the preferred picture scores higher (paper, section 4, HPSv2);
- ``rank``: Spearman's correlation of scores with ratings;
- ``similarity``: mean cosine of a picture's noisy and clean embedding, the mean of the clean ones taken out.

These functions know neither networks nor noise; :mod:`stitchvm.core.skills` runs them over noise levels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError
from .records import ConditionKind, MetricKind

_DEFAULT: dict[ConditionKind, MetricKind] = {"prompts": "recall", "nothing": "rank", "images": "similarity"}
_READERS: dict[MetricKind, tuple[ConditionKind, ...]] = {
    "recall": ("prompts",),
    "preference": ("prompts", "nothing"),
    "rank": ("nothing",),
    "similarity": ("prompts", "nothing", "images"),
}
"""What a reward may compare with to be measured so: a dataset gives prompts, and no reference images."""


def share_kept(values: Sequence[float], clean: float) -> list[float | None]:
    """``values`` over the ``clean`` reward's own, None where that has no skill to keep."""
    return [value / clean if clean > 0 else None for value in values]


def metric_of(reward: Any) -> MetricKind:
    """The metric that a reward's record names, or else that of what it compares with.

    Raises :class:`ConfigError` for a metric that the reward cannot be measured by.
    """
    kind = reward.condition_kind
    metric: MetricKind = getattr(reward.record, "metric", None) or _DEFAULT[kind]
    if kind not in _READERS[metric]:
        raise ConfigError(
            f"the record of {reward.record.name!r} says metric = {metric!r}, which needs a reward that compares with "
            f"{' or '.join(_READERS[metric])}; this one compares with {kind}. Correct 'metric'."
        )
    return metric


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


def recall_by_chance(captions: Sequence[str]) -> float:
    """What a random answer reaches in :func:`recall_at_one`: ``1 / N`` when no two captions agree."""
    return sum(count**2 for count in Counter(captions).values()) / len(captions) ** 2


def preference_accuracy(preferred: Tensor, rejected: Tensor) -> float:
    """Share in [0, 1] of pairs whose ``preferred [N]`` score is above the ``rejected [N]`` one; a tie counts half, so
    that chance is 0.5 also for a score that tells nothing apart.

    Raises :class:`ConfigError` for no pair.
    """
    if not len(preferred):
        raise ConfigError("preference needs at least one pair of pictures.")
    wins = (preferred > rejected).double() + 0.5 * (preferred == rejected).double()
    return float(wins.mean())


def spearman(values: Tensor, rewards: Tensor) -> Tensor:
    """``[P]``: Spearman's coefficient (ties share their mean rank) of each row of ``[P, S]`` with that of ``rewards``.

    A constant row of values ranks nothing: 0.
    """
    ranks = [torch.from_numpy(rankdata(table.double().cpu().numpy(), axis=1)) for table in (values, rewards)]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(1) / scale.clamp_min(1e-12), 0.0)


def centred_similarity(noisy: Tensor, clean: Tensor) -> float:
    """Mean cosine in [-1, 1] between rows of ``noisy [N, D]`` and of ``clean [N, D]``, after both were normalised and
    the mean of the normalised ``clean`` was subtracted from either.

    Embeddings of one tower share a large common part, so that without the subtraction any two look alike. Their length
    plays no part: nothing in stage 2 teaches it. Of the clean embeddings themselves it is 1 by definition.

    Raises :class:`ConfigError` for fewer than two rows or for clean embeddings that are all the same.
    """
    noisy, clean = (F.normalize(rows.double(), dim=-1) for rows in (noisy, clean))
    centre = clean.mean(0, keepdim=True)
    if len(clean) < 2 or bool(((clean - centre).norm(dim=-1) < 1e-9).all()):
        raise ConfigError("similarity needs at least two pictures whose clean embeddings differ.")
    return float(F.cosine_similarity(noisy - centre, clean - centre, dim=-1).mean())
