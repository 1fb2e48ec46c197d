"""open_clip's evaluation transform on tensors, so that gradients pass through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import attrs
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from stitchvm.core import ConfigError


def _triple(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),) * 3


@attrs.frozen(kw_only=True)
class Preprocessing:
    """``[B, 3, H, W]`` in [0, 1] to ``[B, 3, size, size]``, float32: antialiased resize, crop or pad, normalise.

    ``resize_mode``: ``shortest`` side to ``size`` and centre crop, ``longest`` side and pad with ``fill_color`` (0 to
    255), or ``squash`` both. Within one level of 255 of the PIL transform, which rounds to 8 bits after each direction.
    """

    size: int
    mean: tuple[float, ...] = attrs.field(default=OPENAI_DATASET_MEAN, converter=_triple)
    std: tuple[float, ...] = attrs.field(default=OPENAI_DATASET_STD, converter=_triple)
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
        if images.ndim != 4 or images.shape[1] != 3:
            raise ConfigError(f"images must be [batch, 3, height, width] in [0, 1], got {list(images.shape)}.")
        pixels = images.float()
        height, width = self._sides(*pixels.shape[-2:])
        # Columns before rows, clamped after each: bicubic overshoots, and PIL's 8-bit images between the passes cannot.
        for sides in ((pixels.shape[-2], width), (height, width)):
            if sides != tuple(pixels.shape[-2:]):
                pixels = F.interpolate(pixels, sides, mode=self.interpolation, antialias=True).clamp(0, 1)
        pixels = _centre(pixels, self.size, self.fill_color / 255)
        mean, std = (torch.tensor(v, device=pixels.device).reshape(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; the two modes round as the transforms they follow."""
        short, long = min(height, width), max(height, width)
        if self.resize_mode == "squash":
            return self.size, self.size
        if self.resize_mode == "longest":
            return round(height * self.size / long), round(width * self.size / long)
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)


def _centre(pixels: Tensor, size: int, fill: float) -> Tensor:
    """Centre crop to ``size`` and pad what is smaller, the odd pixel going below and to the right."""
    missing = [max(size - side, 0) for side in pixels.shape[-2:]]
    if any(missing):
        (rows, columns) = missing
        pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=fill)
    top, left = (round((side - size) / 2) for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]
