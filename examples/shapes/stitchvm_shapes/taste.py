"""The taste of this world: how good a scene looks, from 1 to 10, by a formula that is known.

`beauty` weighs five terms, each in 0 .. 1:

- **warmth** 0.30: red minus blue of an object's colour, from the coldest colour (0) to the warmest (1), meaned over the
  objects.
- **contrast** 0.20: how far an object's colour lies from the background's, as distance in RGB between `NEAREST` (0) and
  `FARTHEST` (1), meaned over the objects.
- **texture** 0.20: by `TEXTURE_APPEAL`; soft light pleases, patterns do not.
- **harmony** 0.15: (1 + cos h) / 2 for two objects whose hues lie h apart, meaned over the pairs; an object alone has
  0.5.
- **size** 0.15: by the number of large objects, `SIZE_APPEAL`; a picture of small things alone looks empty.

One person's rating scatters around the formula by `RATING_NOISE`.
"""

from __future__ import annotations

import colorsys
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from .render import BACKGROUND_RGB, COLOUR_RGB
from .scenes import Scene

TERM_WEIGHTS = {"warmth": 0.30, "contrast": 0.20, "texture": 0.20, "harmony": 0.15, "size": 0.15}
TEXTURE_APPEAL = {"gradient": 1.0, "plain": 0.4, "striped": 0.2, "checkered": 0.1}
#: For no, one, and two or more large objects.
SIZE_APPEAL = (0.0, 0.7, 1.0)
#: Distances in RGB at which an object hardly stands out, and stands out fully.
NEAREST, FARTHEST = 0.3, 1.0
#: What `beauty` is when every term is 0 and 1.
LOWEST, HIGHEST = 1.0, 10.0
#: Standard deviation of one person's rating around the formula.
RATING_NOISE = 0.6

_HUES = {name: 2 * math.pi * colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOUR_RGB.items()}
_HEAT = {name: rgb[0] - rgb[2] for name, rgb in COLOUR_RGB.items()}
_COLDEST, _WARMEST = min(_HEAT.values()), max(_HEAT.values())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def terms(scene: Scene) -> dict[str, float]:
    """The five terms of `beauty`, each in 0 .. 1."""
    colours = [thing.colour for thing in scene.things]
    ground = BACKGROUND_RGB[scene.background]
    distances = [math.dist(COLOUR_RGB[colour], ground) for colour in colours]
    between = [(1 + math.cos(_HUES[a] - _HUES[b])) / 2 for a, b in itertools.combinations(colours, 2)]
    large = sum(thing.size == "large" for thing in scene.things)
    return {
        "warmth": _mean([(_HEAT[colour] - _COLDEST) / (_WARMEST - _COLDEST) for colour in colours]),
        "contrast": _mean([min(max(d - NEAREST, 0.0) / (FARTHEST - NEAREST), 1.0) for d in distances]),
        "texture": TEXTURE_APPEAL[scene.texture],
        "harmony": _mean(between) if between else 0.5,
        "size": SIZE_APPEAL[min(large, len(SIZE_APPEAL) - 1)],
    }


def beauty(scene: Scene) -> float:
    """How good `scene` looks, 1 .. 10: 1 + 9 times the weighted terms; nothing but the scene decides it."""
    return LOWEST + (HIGHEST - LOWEST) * sum(TERM_WEIGHTS[name] * value for name, value in terms(scene).items())


def rate(scenes: list[Scene], rng: np.random.Generator) -> NDArray[np.float32]:
    """One person's rating of each scene, float32 [N]: `beauty` plus normal noise of deviation `RATING_NOISE`.

    It is not cut off at 1 and 10, which would pull the mean rating of the best and the worst towards the middle.
    """
    clear = np.array([beauty(scene) for scene in scenes])
    return np.asarray(clear + RATING_NOISE * rng.standard_normal(len(scenes)), np.float32)
