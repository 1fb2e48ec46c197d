"""The world as a dataset of StitchVM: captioned scenes, held-out prompts and the detector."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from stitchvm.core import Captioned

from .detector import Detector
from .render import make_split
from .scenes import Split


class ShapesWorld:
    """Captioned 64x64 scenes; no caption of the ``test`` split is in ``train``."""

    @cached_property
    def detector(self) -> Detector:
        """The shipped detector."""
        return Detector.load()

    def captioned(self, split: Split, count: int, seed: int = 0) -> Captioned:
        """``count`` scenes, uint8 ``[count, 3, 64, 64]``, and their captions; a fixed function of the arguments."""
        images, captions, _ = make_split(split, count, seed)
        return Captioned(images, captions)

    def prompts(self, split: Split, count: int, seed: int = 0) -> list[str]:
        """``count`` captions, all different in the ``test`` split."""
        return make_split(split, count, seed + 1_000)[1]

    @torch.no_grad()
    def fulfilled(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` bool: the detector's word on images ``[N, 3, 64, 64]`` in [0, 1]."""
        return self.detector.fulfilled(images, prompts)
