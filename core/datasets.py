"""What a dataset plugin offers: captioned images in splits, prompts, a detector that plays GenEval's part, and, where
it can, preferences and ratings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
from torch import Tensor

from .errors import ConfigError

Judge = Callable[[Tensor, list[str]], Any]
"""``judge(images [P, 3, H, W] in [0, 1], prompts) -> [P]``: a detector, a metric; higher is better."""


@attrs.frozen(eq=False)
class Captioned:
    """``images [N, 3, H, W]`` uint8 and as many ``captions``."""

    images: Tensor
    captions: list[str]


@attrs.frozen(eq=False)
class Preferences:
    """Pairs of pictures of one prompt: ``preferred`` and ``rejected [N, 3, H, W]`` uint8 and ``N`` ``prompts``.

    Raises :class:`ConfigError` when they differ in number.
    """

    preferred: Tensor
    rejected: Tensor
    prompts: list[str]

    def __attrs_post_init__(self) -> None:
        sizes = (len(self.preferred), len(self.rejected), len(self.prompts))
        if len(set(sizes)) > 1:
            raise ConfigError(
                "preferences hold one preferred and one rejected picture a prompt, got {} / {} / {}.".format(*sizes)
            )


@attrs.frozen(eq=False)
class Rated:
    """``images [N, 3, H, W]`` uint8 and their ``ratings [N]``, float, higher is better; only their order counts.

    Raises :class:`ConfigError` when they differ in number.
    """

    images: Tensor
    ratings: Tensor

    def __attrs_post_init__(self) -> None:
        if self.ratings.shape != (len(self.images),):
            raise ConfigError(f"{len(self.images)} images but ratings of shape {list(self.ratings.shape)}.")


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


class PreferenceDataset(Protocol):
    """What a dataset offers beside, for rewards that are measured by preference; splits as for captioned images."""

    def preferences(self, split: str, count: int, seed: int = 0) -> Preferences:
        """``count`` pairs."""
        ...


class RatedDataset(Protocol):
    """What a dataset offers beside, for rewards that are measured by rank; splits as for captioned images."""

    def rated(self, split: str, count: int, seed: int = 0) -> Rated:
        """``count`` rated images."""
        ...


def judges_of(dataset: Any) -> dict[str, Judge]:
    """What judges pictures of ``dataset``'s own prompts and no reward does: its ``detector``, where it has one."""
    fulfilled = getattr(dataset, "fulfilled", None)
    return {} if fulfilled is None else {"detector": fulfilled}


def offering(dataset: Any, method: str, needed: str) -> Any:
    """``dataset``, which must have ``method``; :class:`ConfigError` says what ``needed`` it for."""
    if not callable(getattr(dataset, method, None)):
        raise ConfigError(
            f"{needed} needs a dataset that offers {method}(split, count, seed), and {type(dataset).__name__} does "
            "not; choose another dataset."
        )
    return dataset
