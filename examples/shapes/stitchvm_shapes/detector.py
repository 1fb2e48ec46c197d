"""Says what a picture shows, and whether that is what a caption asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .constants import WEIGHTS
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing

#: Pixels per cell of the centre map.
STRIDE = 4
#: A peak of the centre map is an object from this probability on.
THRESHOLD = 0.4
#: More objects than this are not looked for: no caption asks for so many.
MOST = 5
#: Entries of `attributes`.
ATTRIBUTES = ("count", "objects", "shapes", "colours", "sizes", "relations", "textures", "backgrounds", "fulfilled")

_HEADS = {"centre": 1, "offset": 2, "shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES)}
_AXIS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@attrs.frozen
class Found:
    """An object in a picture: what it is, its centre in pixels, and how sure the detector is (0 .. 1)."""

    thing: Thing
    x: float
    y: float
    score: float


@attrs.frozen
class Detection:
    """What a picture shows."""

    found: tuple[Found, ...]
    texture: str
    background: str


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norms[0](self.first(x)))
        return F.silu(x + self.norms[1](self.second(y)))


class DetectorNet(nn.Module):
    """Images [B, 3, 64, 64] in 0 .. 1 to a 16 x 16 map of centres with attributes, and the background's logits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
        )
        self.body = nn.Sequential(_Residual(width), _Residual(width))
        self.cells = nn.Conv2d(width, sum(_HEADS.values()), 1)
        # Almost no cell is a centre: start from that, not from even odds.
        nn.init.constant_(self.cells.bias[:1], -4.0)  # type: ignore[index]
        self.ground = nn.Linear(3 * width, len(TEXTURES) + len(BACKGROUNDS))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Per-cell outputs {head: [B, n, 16, 16]}, texture logits [B, 4], background logits [B, 6]."""
        features = self.body(self.stem(images * 2 - 1))
        cells = dict(zip(_HEADS, self.cells(features).split(list(_HEADS.values()), 1), strict=True))
        # Mean, deviation and maximum over the picture: a pattern shows in how features vary, a tint in their mean.
        pooled = torch.cat([features.mean((2, 3)), features.flatten(2).std(2), features.amax((2, 3))], 1)
        texture, background = self.ground(pooled).split([len(TEXTURES), len(BACKGROUNDS)], 1)
        return cells, texture, background


def _peaks(centre: Tensor) -> Tensor:
    """Probabilities [B, 1, H, W] that are the highest of their 3 x 3 surroundings; zero elsewhere."""
    probability = centre.sigmoid()
    return probability * (probability == F.max_pool2d(probability, 3, 1, 1))


class Detector:
    """A small trained network with the reading of its maps."""

    def __init__(self, net: DetectorNet) -> None:
        self.net = net.eval()

    @classmethod
    def load(cls, path: Path | None = None) -> Detector:
        """The shipped detector, or the one in another safetensors file."""
        net = DetectorNet()
        state = load_file(path if path is not None else WEIGHTS / "detector.safetensors")
        net.load_state_dict({key: value.float() for key, value in state.items()})
        return cls(net)

    @torch.no_grad()
    def detect(self, images: Tensor, batch: int = 250) -> list[Detection]:
        """What each of the images [N, 3, 64, 64], float in 0 .. 1, shows."""
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64) or not images.is_floating_point():
            raise ValueError(
                f"the detector takes float images [N, 3, 64, 64] in 0 .. 1, not {images.dtype} {list(images.shape)}"
            )
        return [detection for part in images.split(batch) for detection in self._detect(part)]

    def _detect(self, images: Tensor) -> list[Detection]:
        cells, texture, background = self.net(images.to(next(self.net.parameters())))
        scores, index = _peaks(cells["centre"]).flatten(1).topk(MOST)
        row, column = index // cells["centre"].shape[-1], index % cells["centre"].shape[-1]

        def at(head: str) -> Tensor:
            values = cells[head].flatten(2)
            return values.gather(2, index[:, None].expand(-1, values.shape[1], -1))

        x = (column + at("offset")[:, 0]) * STRIDE
        y = (row + at("offset")[:, 1]) * STRIDE
        words = [at(head).argmax(1).tolist() for head in ("size", "colour", "shape")]
        detections = []
        for n in range(len(images)):
            found = [
                Found(
                    Thing(SIZES[words[0][n][k]], COLOURS[words[1][n][k]], SHAPES[words[2][n][k]]),
                    float(x[n, k]),
                    float(y[n, k]),
                    float(scores[n, k]),
                )
                for k in range(MOST)
                if scores[n, k] >= THRESHOLD
            ]
            ground = TEXTURES[int(texture[n].argmax())], BACKGROUNDS[int(background[n].argmax())]
            detections.append(Detection(tuple(found), *ground))
        return detections

    def fulfilled(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each image shows exactly what its caption says: bool [N]."""
        return self.attributes(images, captions)["fulfilled"] > 0.5

    def attributes(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """How much of each caption its image shows, by attribute: float [N] in 0 .. 1 for each of `ATTRIBUTES`.

        The objects of a caption are assigned to those of the picture in the way that suits the caption best. A caption
        with a single object has no relations; they count as fulfilled.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions")
        scenes = [Scene.parse(caption) for caption in captions]
        rows = [compare(seen, scene) for seen, scene in zip(self.detect(images), scenes, strict=True)]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in ATTRIBUTES}


def _holds(relation: str, first: Found, second: Found) -> bool:
    """Whether `first` lies in `relation` to `second`: on that side, and more so than on any other."""
    ux, uy = _AXIS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    return dx * ux + dy * uy > abs(dx * uy) + abs(dy * ux)


def _rate(assigned: tuple[Found | None, ...], scene: Scene) -> dict[str, float]:
    """How well objects of the picture, in the caption's order, play the caption's objects."""
    pairs = list(zip(assigned, scene.things, strict=True))
    count = len(pairs)
    held = [
        a is not None and b is not None and _holds(relation, a, b)
        for relation, a, b in zip(scene.relations, assigned, assigned[1:], strict=False)
    ]
    return {
        "objects": sum(f is not None and f.thing == t for f, t in pairs) / count,
        "shapes": sum(f is not None and f.thing.shape == t.shape for f, t in pairs) / count,
        "colours": sum(f is not None and f.thing.colour == t.colour for f, t in pairs) / count,
        "sizes": sum(f is not None and f.thing.size == t.size for f, t in pairs) / count,
        "relations": sum(held) / len(held) if held else 1.0,
    }


def compare(seen: Detection, scene: Scene) -> dict[str, float]:
    """Each of `ATTRIBUTES` for one picture and one scene."""
    blanks = [None] * len(scene.things)
    ways = itertools.permutations([*seen.found, *blanks], len(scene.things))
    best = max(
        (_rate(way, scene) for way in ways),
        key=lambda rated: (rated["objects"] + rated["relations"], sum(rated.values())),
    )
    result = {
        "count": float(len(seen.found) == len(scene.things)),
        **best,
        "textures": float(seen.texture == scene.texture),
        "backgrounds": float(seen.background == scene.background),
    }
    return {**result, "fulfilled": float(all(value == 1.0 for value in result.values()))}
