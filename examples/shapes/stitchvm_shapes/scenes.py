"""What a scene is, the sentence that describes it, and which sentences are held out."""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Literal

import attrs
import numpy as np

Split = Literal["train", "test"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("gray", "navy", "brown", "olive", "teal", "beige")
TEXTURES = ("plain", "striped", "checkered", "gradient")
RELATIONS = ("left of", "right of", "above", "below")

#: Relative frequency of scenes with one, two and three objects.
COUNT_WEIGHTS = (0.15, 0.50, 0.35)
#: One caption in this many is held out.
TEST_EVERY = 10
#: Longest caption in tokens, begin and end marks included.
MAX_TOKENS = 24

_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GROUND = rf" on a ({'|'.join(TEXTURES)}) ({'|'.join(BACKGROUNDS)}) background"


@attrs.frozen
class Thing:
    """One object of a scene."""

    size: str = attrs.field(validator=attrs.validators.in_(SIZES))
    colour: str = attrs.field(validator=attrs.validators.in_(COLOURS))
    shape: str = attrs.field(validator=attrs.validators.in_(SHAPES))

    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@attrs.frozen
class Scene:
    """One to three objects in a chain of relations, before a background.

    `relations[k]` says where `things[k]` lies as seen from `things[k + 1]`.
    """

    things: tuple[Thing, ...]
    relations: tuple[str, ...]
    texture: str = attrs.field(validator=attrs.validators.in_(TEXTURES))
    background: str = attrs.field(validator=attrs.validators.in_(BACKGROUNDS))

    def __attrs_post_init__(self) -> None:
        if not 1 <= len(self.things) <= 3:
            raise ValueError(f"a scene has one to three objects, not {len(self.things)}")
        if len(self.relations) != len(self.things) - 1:
            raise ValueError("a scene has one relation between each two neighbours of its chain")
        if unknown := set(self.relations) - set(RELATIONS):
            raise ValueError(f"unknown relations {sorted(unknown)}; known are {RELATIONS}")

    @property
    def caption(self) -> str:
        """The one sentence that describes this scene."""
        words = self.things[0].words()
        for relation, thing in zip(self.relations, self.things[1:], strict=True):
            words += f" {relation} {thing.words()}"
        return f"{words} on a {self.texture} {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene that `caption` describes; `Scene.parse(s.caption) == s`."""
        ground = re.search(_GROUND + "$", caption)
        if ground is None:
            raise ValueError(f"not a caption of this world: {caption!r}")
        body = caption[: ground.start()]
        things = tuple(Thing(*found) for found in re.findall(_OBJECT, body))
        relations = tuple(re.findall("|".join(RELATIONS), body))
        if not things or len(relations) != len(things) - 1:
            raise ValueError(f"not a caption of this world: {caption!r}")
        scene = cls(things, relations, ground[1], ground[2])
        if scene.caption != caption:
            raise ValueError(f"not a caption of this world: {caption!r}")
        return scene

    @property
    def split(self) -> Split:
        return split_of(self.caption)


def split_of(caption: str) -> Split:
    """Whether a caption is trained on or held out: a fixed function of its text, whatever the picture's seed."""
    digest = hashlib.sha256(caption.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "little") % TEST_EVERY == 0 else "train"


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _sample_things(rng: np.random.Generator, count: int) -> tuple[Thing, ...]:
    while True:
        things = tuple(Thing(_pick(rng, SIZES), _pick(rng, COLOURS), _pick(rng, SHAPES)) for _ in range(count))
        # Two objects alike in shape and colour would make the caption ambiguous.
        distinct = len({(t.colour, t.shape) for t in things}) == count
        # Three objects in a row have no room for more than one large one.
        if distinct and (count < 3 or sum(t.size == "large" for t in things) <= 1):
            return things


def sample_scene(rng: np.random.Generator, split: Split) -> Scene:
    """A random scene whose caption belongs to `split`."""
    while True:
        count = 1 + int(rng.choice(3, p=COUNT_WEIGHTS))
        things = _sample_things(rng, count)
        relations = tuple(_pick(rng, RELATIONS) for _ in range(count - 1))
        scene = Scene(things, relations, _pick(rng, TEXTURES), _pick(rng, BACKGROUNDS))
        if scene.split == split:
            return scene


def _other(rng: np.random.Generator, words: tuple[str, ...], word: str) -> str:
    return _pick(rng, tuple(w for w in words if w != word))


def _valid(scene: Scene) -> bool:
    pairs = {(t.colour, t.shape) for t in scene.things}
    return len(pairs) == len(scene.things)


def _change_once(scene: Scene, rng: np.random.Generator) -> Scene:
    kinds = ["size", "colour", "shape", "texture", "background"] + ["relation", "swap"] * (len(scene.things) > 1)
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "texture":
        return attrs.evolve(scene, texture=_other(rng, TEXTURES, scene.texture))
    if kind == "background":
        return attrs.evolve(scene, background=_other(rng, BACKGROUNDS, scene.background))
    if kind == "relation":
        relations = list(scene.relations)
        k = int(rng.integers(len(relations)))
        relations[k] = _other(rng, RELATIONS, relations[k])
        return attrs.evolve(scene, relations=tuple(relations))
    things = list(scene.things)
    k = int(rng.integers(len(things)))
    if kind == "swap":
        # The two keep their places but exchange one attribute: the words stay the same, only the binding changes.
        a, b = list(itertools.combinations(range(len(things)), 2))[
            int(rng.integers(len(things) * (len(things) - 1) // 2))
        ]
        name = ("size", "colour", "shape")[int(rng.integers(3))]
        x, y = getattr(things[a], name), getattr(things[b], name)
        things[a], things[b] = attrs.evolve(things[a], **{name: y}), attrs.evolve(things[b], **{name: x})
    else:
        words = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}[kind]
        things[k] = attrs.evolve(things[k], **{kind: _other(rng, words, getattr(things[k], kind))})
    return attrs.evolve(scene, things=tuple(things))


def change_one(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one attribute, one relation or one exchanged attribute: a hard negative of `scene`."""
    while True:
        changed = _change_once(scene, rng)
        if changed != scene and _valid(changed):
            return changed


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted."""
    words = {"a", "on", "background", *SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *TEXTURES}
    words.update(word for relation in RELATIONS for word in relation.split())
    return sorted(words)
