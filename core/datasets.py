"""What a dataset plugin offers: captioned images in splits, prompts, and a detector that plays GenEval's part."""

from __future__ import annotations

from typing import Protocol

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class Captioned:
    """``images [N, 3, H, W]`` uint8 and as many ``captions``."""

    images: Tensor
    captions: list[str]


class CaptionedDataset(Protocol):
    """The contract of a ``DatasetRecord``'s class, built without arguments.

    Splits are ``train`` and ``test``; no caption of one is in the other. The same arguments always give the same data.
    """

    def captioned(self, split: str, count: int, seed: int = 0) -> Captioned:
        """``count`` captioned images."""
        ...

    def prompts(self, split: str, count: int, seed: int = 0) -> list[str]:
        """``count`` different captions."""
        ...

    def fulfilled(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` bool: does each image ``[N, 3, H, W]`` in [0, 1] show what its prompt says."""
        ...
