"""HPSv2, human preference scores (arXiv 2306.09341): a CLIP ViT-H/14 with preprocessing of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import attrs
import torch.nn.functional as F
from torch import Tensor

from stitchvm.core import ConfigError

from .clip import ClipReward
from .preprocessing import OPENAI_MEAN, OPENAI_STD, centred, checked, normalised, triple
from .token_tower import Transform


@attrs.frozen(kw_only=True)
class Letterbox:
    """``[B, 3, H, W]`` in [0, 1] to ``[B, 3, size, size]``: longest side to ``size``, black bars, normalise.

    HPSv2's own transform (tgxs002/HPSv2, ``open_clip/transform.py``). It resizes float tensors, with antialiasing as
    torchvision does since 0.17 and without rounding to 8 bits or clamping; the two agree to float32 rounding. An image
    whose longest side has that size already gets its bars here, where HPSv2 leaves them out and fails.
    """

    size: int
    mean: tuple[float, ...] = attrs.field(default=OPENAI_MEAN, converter=triple)
    std: tuple[float, ...] = attrs.field(default=OPENAI_STD, converter=triple)

    @classmethod
    def from_config(cls, image_size: int, config: Mapping[str, Any]) -> Self:
        """From a ``preprocess_cfg``; :class:`ConfigError` for a size or setting that this transform does not have."""
        settings = {"size": image_size, **config}
        try:
            transform = cls(**settings)
        except TypeError as error:
            raise ConfigError(f"preprocess_cfg: {error}; HPSv2 always pads to a square.") from error
        if transform.size != image_size:
            raise ConfigError(f"preprocess_cfg resizes to {transform.size} pixels, but the tower reads {image_size}.")
        return transform

    def __call__(self, images: Tensor) -> Tensor:
        pixels = checked(images)
        scale = self.size / max(pixels.shape[-2:])
        sides = [max(round(side * scale), 1) for side in pixels.shape[-2:]]
        if sides != list(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=True)
        return normalised(centred(pixels, self.size, 0.0), self.mean, self.std)


class Hpsv2Reward(ClipReward):
    """A :class:`ClipReward` behind a :class:`Letterbox`; the score is the plain cosine, typically 0.2 to 0.4.

    Scores of versions 2.0 and 2.1 are not comparable, nor are those of different prompts.
    """

    @classmethod
    def make_transform(cls, size: int, config: Mapping[str, Any]) -> Transform:
        return Letterbox.from_config(size, config)
