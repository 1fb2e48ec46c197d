"""Pairs of pictures of one prompt with a hidden utility, and simulated people who choose with some noise.

A picture's utility for a prompt is

    u = - WRONG * (number of wrong attributes) - FOG * fog - BLUR * blur - GRAIN * grain
        + BALANCE * balance + LOOK * look

with fog, blur, grain, balance and look (`taste.beauty` of what is shown) in 0 .. 1. `WRONG` exceeds all the other
coefficients together: what does what the prompt says is better than what does not, however it looks. People prefer the
first of two pictures with the probability of Bradley and Terry, sigmoid((u1 - u2) / `TEMPERATURE`).
"""

from __future__ import annotations

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .render import SIZE, Placement, place, render_placed
from .scenes import Scene, Split, change_one, sample_scene
from .taste import HIGHEST, LOWEST, beauty

WRONG, FOG, BLUR, GRAIN, BALANCE, LOOK = 3.0, 1.2, 0.5, 0.5, 0.3, 0.3
#: Spread of people's choices: they agree with the utility in about nine pairs of ten that `draw_pairs` makes.
TEMPERATURE = 0.4
#: Utilities that differ by this much differ clearly.
CLEAR = 0.5
#: Probabilities that a picture shows the prompt's scene, one changed once, and one changed twice.
CHANGES = (0.6, 0.3, 0.1)
#: How far the strongest fog pulls every pixel towards white.
THICKEST_FOG = 0.6
#: Standard deviation of the strongest grain, in units of the brightest pixel.
STRONGEST_GRAIN = 0.12
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@attrs.frozen
class Shot:
    """A picture before it is drawn: what it shows, where, and its fog, blur and grain (0 .. 1 each)."""

    shown: Scene
    spot: Placement
    fog: float = 0.0
    blur: float = 0.0
    grain: float = 0.0


@attrs.frozen(eq=False)
class Pairs:
    """Images uint8 [N, 2, 3, 64, 64] and the caption asked for of each pair; of each picture, the caption of what it
    really shows (2 N, pair after pair), the utility float32 [N, 2], and the number of wrong attributes int64 [N, 2].
    """

    images: Tensor
    captions: list[str]
    shown: list[str]
    utilities: Tensor
    wrong: Tensor


def _differences(asked: Scene, shown: Scene) -> int:
    pairs = [(asked.texture, shown.texture), (asked.background, shown.background)]
    pairs += zip(asked.relations, shown.relations, strict=True)
    for a, b in zip(asked.things, shown.things, strict=True):
        pairs += [(a.size, b.size), (a.colour, b.colour), (a.shape, b.shape)]
    return sum(a != b for a, b in pairs)


def wrong_attributes(asked: Scene, shown: Scene) -> int:
    """How many words for sizes, colours, shapes, relations, texture and background would have to be exchanged.

    "A left of B" and "B right of A" say the same. Raises `ValueError` for scenes with different numbers of objects.
    """
    if len(asked.things) != len(shown.things):
        raise ValueError(f"{len(asked.things)} objects asked for and {len(shown.things)} shown; they cannot be matched")
    turned = attrs.evolve(
        shown, things=shown.things[::-1], relations=tuple(_INVERSE[word] for word in shown.relations[::-1])
    )
    return min(_differences(asked, shown), _differences(asked, turned))


def balance(spot: Placement) -> float:
    """1 with the objects' centre of gravity (by area) in the middle of the picture, 0 from a quarter of it away on."""
    weights = spot.radii**2 / (spot.radii**2).sum()
    centre = (spot.centres * weights[:, None]).sum(0)
    away = float(np.hypot(*(centre - (SIZE - 1) / 2)))
    return max(0.0, 1 - away / (SIZE / 4))


def utility(asked: Scene, shot: Shot) -> float:
    """The utility of a picture for a prompt; see the module."""
    look = (beauty(shot.shown) - LOWEST) / (HIGHEST - LOWEST)
    quality = BALANCE * balance(shot.spot) + LOOK * look - FOG * shot.fog - BLUR * shot.blur - GRAIN * shot.grain
    return quality - WRONG * wrong_attributes(asked, shot.shown)


def _take(asked: Scene, split: Split, rng: np.random.Generator) -> Shot:
    """A random picture for a prompt; in training it never shows the scene of a held-out caption."""
    changes = int(rng.choice(len(CHANGES), p=CHANGES))
    while True:
        shown = asked
        for _ in range(changes):
            shown = change_one(shown, rng)
        if split == "test" or shown.split == "train":
            break
    spots = [place(shown, rng) for _ in range(2)]
    # The better and the worse of two places, so that balance varies more than chance would make it.
    spot = (max if rng.random() < 0.5 else min)(spots, key=balance)
    return Shot(shown, spot, *(rng.uniform(0.3, 1.0, 3) * (rng.random(3) < 0.5)).tolist())


def _spoil(images: Tensor, shots: list[Shot], rng: np.random.Generator) -> Tensor:
    """Images uint8 [N, 3, 64, 64] with the blur, fog and grain of `shots`; the strongest blur is a box of 5 x 5."""
    fog, blur, grain = torch.tensor([[shot.fog, shot.blur, shot.grain] for shot in shots]).T[..., None, None, None]
    clear = images.float() / 255
    boxed = F.avg_pool2d(F.pad(clear, (2, 2, 2, 2), mode="replicate"), 5, 1)
    fogged = clear.lerp(boxed, blur).lerp(torch.ones(()), THICKEST_FOG * fog)
    noise = torch.from_numpy(rng.standard_normal(clear.shape, np.float32))
    return ((fogged + STRONGEST_GRAIN * grain * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def draw_pairs(split: Split, count: int, rng: np.random.Generator) -> Pairs:
    """`count` pairs whose prompts belong to `split`."""
    asked = [sample_scene(rng, split) for _ in range(count)]
    shots = [_take(scene, split, rng) for scene in asked for _ in range(2)]
    drawn = np.stack([render_placed(shot.shown, shot.spot, rng) for shot in shots])
    images = _spoil(torch.from_numpy(drawn), shots, rng)
    prompts = [scene for scene in asked for _ in range(2)]
    utilities = [utility(scene, shot) for scene, shot in zip(prompts, shots, strict=True)]
    wrong = [wrong_attributes(scene, shot.shown) for scene, shot in zip(prompts, shots, strict=True)]
    return Pairs(
        images.unflatten(0, (count, 2)),
        [scene.caption for scene in asked],
        [shot.shown.caption for shot in shots],
        torch.tensor(utilities).view(count, 2),
        torch.tensor(wrong).view(count, 2),
    )


def choose(utilities: Tensor, rng: np.random.Generator) -> Tensor:
    """Which picture of each pair a person prefers: int64 [N], 0 or 1, from utilities [N, 2] after Bradley and Terry."""
    second = ((utilities[:, 1] - utilities[:, 0]) / TEMPERATURE).sigmoid()
    draws: NDArray[np.float32] = rng.random(len(utilities), np.float32)
    return (torch.from_numpy(draws) < second).long()


def clear_pairs(split: Split, count: int, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """Preferred and rejected images uint8 [count, 3, 64, 64] and prompts; utilities differ by at least `CLEAR`.

    The preferred one has the higher utility, without people's noise. A fixed function of the arguments.
    """
    if count < 0:
        raise ValueError("count is not negative")
    rng = np.random.default_rng((seed, 2 if split == "train" else 3))
    best: list[Tensor] = []
    worst: list[Tensor] = []
    prompts: list[str] = []
    while len(prompts) < count:
        pairs = draw_pairs(split, 50, rng)
        better = pairs.utilities.argmax(1)
        for k in (pairs.utilities.diff(dim=1).abs()[:, 0] >= CLEAR).nonzero()[:, 0].tolist():
            best.append(pairs.images[k, better[k]])
            worst.append(pairs.images[k, 1 - better[k]])
            prompts.append(pairs.captions[k])
    empty = torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8)
    if count == 0:
        return empty, empty, []
    return torch.stack(best[:count]), torch.stack(worst[:count]), prompts[:count]
