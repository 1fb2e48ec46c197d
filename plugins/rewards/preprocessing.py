"""open_clip's evaluation transform on tensors, so that gradients pass through it; CLIP's own and timm's are cases of
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm.core import ConfigError

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics that OpenAI's CLIP and most of its successors normalise with."""


def triple(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),) * 3


@attrs.frozen(kw_only=True)
class Preprocessing:
    """``[B, 3, H, W]`` in [0, 1] to ``[B, 3, size, size]``, float32: antialiased resize, crop or pad, normalise.

    ``resize_mode``: ``shortest`` side to ``size`` and centre crop, ``longest`` side and pad with ``fill_color`` (0 to
    255), or ``squash`` both. Within one level of 255 of the PIL transform, which rounds to 8 bits after each direction.
    """

    size: int
    mean: tuple[float, ...] = attrs.field(default=OPENAI_MEAN, converter=triple)
    std: tuple[float, ...] = attrs.field(default=OPENAI_STD, converter=triple)
    interpolation: Literal["bicubic", "bilinear"] = attrs.field(
        default="bicubic", validator=attrs.validators.in_(("bicubic", "bilinear"))
    )
    resize_mode: Literal["shortest", "longest", "squash"] = attrs.field(
        default="shortest", validator=attrs.validators.in_(("shortest", "longest", "squash"))
    )
    fill_color: float = 0.0

    @classmethod
    def from_config(cls, image_size: int, config: Mapping[str, Any]) -> Self:
        """From open_clip's ``preprocess_cfg`` for a tower of ``image_size`` pixels.

        Raises :class:`ConfigError` for an unknown setting or a size that is not the tower's.
        """
        settings = {name: value for name, value in config.items() if name not in ("mode", "size") and value is not None}
        size = config.get("size", image_size)
        sides = set(size) if isinstance(size, list | tuple) else {size}
        if sides != {image_size}:
            raise ConfigError(f"preprocess_cfg resizes to {size} pixels, but the tower reads {image_size}.")
        try:
            return cls(size=image_size, **settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"preprocess_cfg: {error}") from error

    def __call__(self, images: Tensor) -> Tensor:
        pixels = checked(images)
        height, width = self._sides(*pixels.shape[-2:])
        # Columns before rows, clamped after each: bicubic overshoots, and PIL's 8-bit images between the passes cannot.
        for sides in ((pixels.shape[-2], width), (height, width)):
            if sides != tuple(pixels.shape[-2:]):
                pixels = F.interpolate(pixels, sides, mode=self.interpolation, antialias=True).clamp(0, 1)
        return normalised(centred(pixels, self.size, self.fill_color / 255), self.mean, self.std)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; the two modes round as the transforms they follow."""
        short, long = min(height, width), max(height, width)
        if self.resize_mode == "squash":
            return self.size, self.size
        if self.resize_mode == "longest":
            return round(height * self.size / long), round(width * self.size / long)
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)


def checked(images: Tensor) -> Tensor:
    """Images in float32; :class:`ConfigError` unless they are ``[B, 3, H, W]``."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"images must be [batch, 3, height, width] in [0, 1], got {list(images.shape)}.")
    return images.float()


def centred(pixels: Tensor, size: int, fill: float) -> Tensor:
    """Centre crop to ``size`` and pad what is smaller, the odd pixel going below and to the right."""
    missing = [max(size - side, 0) for side in pixels.shape[-2:]]
    if any(missing):
        (rows, columns) = missing
        pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=fill)
    top, left = (round((side - size) / 2) for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(pixels - mean) / std`` by channel."""
    centre, scale = (torch.tensor(v, device=pixels.device).reshape(3, 1, 1) for v in (mean, std))
    return (pixels - centre) / scale
