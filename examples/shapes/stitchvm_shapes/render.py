"""Pictures of scenes: anti-aliased signed distance shapes with light, shadow and grain, 64 x 64 pixels."""

from __future__ import annotations

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .scenes import Scene, Split, sample_scene

Array = NDArray[np.float32]

SIZE = 64
#: Radius of the circle an object fits in, in pixels (lowest, highest).
RADII = {"small": (6.0, 7.0), "large": (10.2, 11.6)}
#: A relation holds along one axis, and is clearer there than along the other by this many pixels.
RELATION_MARGIN = 5.0
#: Free pixels between two objects, and between an object and the border.
GAP = 1.5

COLOUR_RGB = {
    "red": (0.88, 0.11, 0.12), "orange": (1.00, 0.52, 0.04), "yellow": (0.98, 0.91, 0.14), "green": (0.14, 0.74, 0.18),
    "cyan": (0.16, 0.86, 0.93), "blue": (0.13, 0.26, 0.95), "purple": (0.56, 0.13, 0.78), "pink": (1.00, 0.52, 0.76),
}  # fmt: skip
BACKGROUND_RGB = {
    "gray": (0.50, 0.50, 0.52), "navy": (0.11, 0.14, 0.34), "brown": (0.40, 0.26, 0.16), "olive": (0.42, 0.44, 0.18),
    "teal": (0.12, 0.41, 0.41), "beige": (0.80, 0.74, 0.62),
}  # fmt: skip

_Y, _X = np.meshgrid(np.arange(SIZE, dtype=np.float32), np.arange(SIZE, dtype=np.float32), indexing="ij")
_AXIS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@attrs.frozen
class Placement:
    """Where the objects of a scene lie: centres [n, 2] as (x, y) and radii [n], in pixels."""

    centres: Array
    radii: Array


def _holds(relation: str, first: Array, second: Array) -> NDArray[np.bool_]:
    """Whether `first` [..., 2] lies in `relation` to `second` [..., 2], by a clear margin."""
    ux, uy = _AXIS[relation]
    delta = first - second
    along = delta[..., 0] * ux + delta[..., 1] * uy
    across = np.abs(delta[..., 0] * uy) + np.abs(delta[..., 1] * ux)
    return np.asarray(along >= across + RELATION_MARGIN)


def place(scene: Scene, rng: np.random.Generator) -> Placement:
    """Random places that satisfy the scene's relations without overlap or cropping."""
    n = len(scene.things)
    tries = 64
    while True:
        low, high = np.array([RADII[t.size] for t in scene.things], np.float32).T
        radii = rng.uniform(low, high).astype(np.float32)
        margin = (radii + GAP)[None, :, None]
        centres = (margin + rng.random((tries, n, 2), np.float32) * (SIZE - 1 - 2 * margin)).astype(np.float32)
        good = np.ones(tries, bool)
        for a in range(n):
            for b in range(a + 1, n):
                apart = np.hypot(*np.moveaxis(centres[:, a] - centres[:, b], -1, 0))
                good &= apart >= radii[a] + radii[b] + GAP
        for k, relation in enumerate(scene.relations):
            good &= _holds(relation, centres[:, k], centres[:, k + 1])
        if good.any():
            return Placement(centres[int(np.argmax(good))], radii)
        tries = min(tries * 2, 4096)


def _polygon(x: Array, y: Array, corners: int, inradius: float) -> Array:
    """Signed distance (inside negative, exact on the edges) to a regular polygon standing on its base."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    planes = [x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)) for a in angles]
    return np.maximum.reduce(planes) - np.float32(inradius)


def _star(x: Array, y: Array, radius: float) -> Array:
    """Signed distance to a five-pointed star, by folding the plane onto one half of one point."""
    angle = np.arctan2(x, -y)
    half = np.pi / 5
    folded = np.abs((angle + half) % (2 * half) - half)
    length = np.hypot(x, y)
    px, py = length * np.cos(folded), length * np.sin(folded)
    tip, notch = np.array([radius, 0.0]), 0.46 * radius * np.array([np.cos(half), np.sin(half)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return np.asarray((px - tip[0]) * normal[0] + (py - tip[1]) * normal[1], np.float32)


def signed_distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Distance in pixels from the shape's outline, negative inside; (x, y) relative to its centre."""
    if shape == "circle":
        return np.hypot(x, y) - np.float32(0.94 * radius)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - np.float32(0.72 * radius)) - np.float32(0.24 * radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.76 * radius)
    if shape == "triangle":
        return _polygon(x, y - np.float32(0.14 * radius), 3, 0.52 * radius)
    if shape == "star":
        return _star(x, y, 1.08 * radius)
    if shape == "cross":
        arm, half = np.float32(0.95 * radius), np.float32(0.33 * radius)
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm))
    raise ValueError(f"unknown shape {shape!r}")


def _smooth_noise(rng: np.random.Generator, cells: int) -> Array:
    """Unit-free soft noise [64, 64] in about -1 .. 1, with `cells` lumps along each side."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    at = np.linspace(0, cells - 1, SIZE, dtype=np.float32)
    left = np.minimum(at.astype(int), cells - 2)
    w = at - left
    rows = coarse[left] * (1 - w)[:, None] + coarse[left + 1] * w[:, None]
    return np.asarray(rows[:, left] * (1 - w) + rows[:, left + 1] * w, np.float32)


def _texture(kind: str, rng: np.random.Generator) -> Array:
    """Brightness factor [64, 64] of a background."""
    angle = rng.uniform(0, 2 * np.pi)
    phase = rng.uniform(0, 8, 2)
    if kind == "plain":
        return np.ones((SIZE, SIZE), np.float32)
    if kind == "gradient":
        along = (_X - 31.5) * np.float32(np.cos(angle)) + (_Y - 31.5) * np.float32(np.sin(angle))
        return np.float32(1.0) + along * np.float32(rng.uniform(0.42, 0.50) / 32)
    if kind == "striped":
        # Either upright, level or slanted; never so fine that the latent grid cannot carry it.
        angle = rng.integers(4) * np.pi / 4 + rng.normal(0, 0.05)
        along = (_X * np.float32(np.cos(angle)) + _Y * np.float32(np.sin(angle)) + np.float32(phase[0])) % 8
        ramp = np.clip(np.abs(along - 4) - 2 + 0.5, 0, 1)
        return np.asarray(0.84 + 0.32 * ramp, np.float32)
    squares = np.sin((_X + np.float32(phase[0])) * np.float32(np.pi / 8)) * np.sin(
        (_Y + np.float32(phase[1])) * np.float32(np.pi / 8)
    )
    return np.asarray(1.0 + 0.16 * np.clip(squares * 5, -1, 1), np.float32)


def _shade(canvas: Array, scene: Scene, spot: Placement, light: Array, rng: np.random.Generator) -> Array:
    """Draw the objects, lit from `light` (a unit vector towards the lamp), each with a soft shadow behind it."""
    for thing, (cx, cy), radius in zip(scene.things, spot.centres, spot.radii, strict=True):
        turn = rng.uniform(-0.2, 0.2)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        dx, dy = _X - cx, _Y - cy
        x, y = dx * cos + dy * sin, dy * cos - dx * sin
        distance = signed_distance(thing.shape, x, y, float(radius))
        shifted = np.roll(distance, (int(np.rint(-1.6 * light[1])), int(np.rint(-1.6 * light[0]))), (0, 1))
        shadow: Array = np.clip(0.5 - shifted / 3, 0, 1).astype(np.float32)
        canvas = canvas * (1 - np.float32(0.35) * shadow)
        colour = np.array(COLOUR_RGB[thing.colour], np.float32) + rng.normal(0, 0.02, 3).astype(np.float32)
        lit = 1 + np.float32(0.16) * (dx * light[0] + dy * light[1]) / radius
        rim = 1 - 0.22 * np.clip(1 + distance / 2.5, 0, 1)
        grain = 1 + np.float32(0.05) * _smooth_noise(rng, 14)
        cover = np.clip(0.5 - distance, 0, 1)
        canvas = canvas * (1 - cover) + colour[:, None, None] * (lit * rim * grain) * cover
    return np.asarray(canvas, np.float32)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of `scene`, uint8 [3, 64, 64]; place, turn, tint, light and grain are drawn from `rng`."""
    return render_placed(scene, place(scene, rng), rng)


def render_placed(scene: Scene, spot: Placement, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of `scene` with the objects at given places, uint8 [3, 64, 64]."""
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(angle), np.sin(angle)], np.float32)
    ground = np.array(BACKGROUND_RGB[scene.background], np.float32) + rng.normal(0, 0.015, 3).astype(np.float32)
    lamp = 1 + np.float32(0.05 / 32) * ((_X - 31.5) * light[0] + (_Y - 31.5) * light[1])
    canvas = ground[:, None, None] * (
        _texture(scene.texture, rng) * lamp * (1 + np.float32(0.03) * _smooth_noise(rng, 9))
    )
    canvas = _shade(canvas, scene, spot, light, rng)
    canvas = canvas + rng.standard_normal((3, SIZE, SIZE), np.float32) * np.float32(0.010)
    return np.asarray(np.clip(canvas * 255 + 0.5, 0, 255), np.uint8)


def make_split(split: Split, count: int, seed: int) -> tuple[Tensor, list[str], list[Scene]]:
    """`count` scenes of a split: images uint8 [count, 3, 64, 64], captions, scenes; a fixed function of the arguments.

    Held-out scenes all have different captions, so that retrieval among them has one right answer.
    """
    if count < 0:
        raise ValueError("count is not negative")
    rng = np.random.default_rng((seed, 0 if split == "train" else 1))
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    scenes: list[Scene] = []
    seen: set[str] = set()
    while len(scenes) < count:
        scene = sample_scene(rng, split)
        if split == "test" and scene.caption in seen:
            continue
        seen.add(scene.caption)
        images[len(scenes)] = render(scene, rng)
        scenes.append(scene)
    return torch.from_numpy(images), [scene.caption for scene in scenes], scenes
