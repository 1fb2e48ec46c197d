"""The world as a dataset of StitchVM: captioned scenes, held-out prompts, preferences, ratings and the detector."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from stitchvm.core import Captioned, Preferences, Rated

from .detector import Detector
from .preferences import clear_pairs
from .render import make_split
from .scenes import Split
from .taste import beauty


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

    def preferences(self, split: Split, count: int, seed: int = 0) -> Preferences:
        """``count`` pairs of pictures of one prompt, the one of clearly higher utility first, as ``preferences`` says.

        uint8 ``[count, 3, 64, 64]`` each; without people's noise; a fixed function of the arguments.
        """
        return Preferences(*clear_pairs(split, count, seed))

    def rated(self, split: Split, count: int, seed: int = 0) -> Rated:
        """``count`` scenes, uint8 ``[count, 3, 64, 64]``, and how good they look, 1 to 10, by ``taste.beauty``.

        Without raters' noise; a fixed function of the arguments.
        """
        images, _, scenes = make_split(split, count, seed + 2_000)
        return Rated(images, torch.tensor([beauty(scene) for scene in scenes]))

    @torch.no_grad()
    def fulfilled(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` bool: the detector's word on images ``[N, 3, 64, 64]`` in [0, 1]."""
        return self.detector.fulfilled(images, prompts)
