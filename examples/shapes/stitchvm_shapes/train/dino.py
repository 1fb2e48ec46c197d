"""The likeness model: a timm vision transformer trained without captions, by contrast and by distillation.

Two pictures of one scene, placed, lit and cut out anew, are alike; pictures of other scenes are not, least of all that
of a scene with one thing changed, which is in every batch. As DINOv2's small models learn from its largest, this one
also learns what shapes-clip's image tower makes of the pictures. In trainings as short as these
self-distillation (DINO, Caron et al. 2021) told scenes apart by their ground alone, and contrast alone a scene from one
with another shape 70 % of the time (`tells_shapes`, 988 steps), less than shapes-clip.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..render import make_split, render
from ..scenes import SHAPES, TEXTURES, Scene, change_one, sample_scene
from . import clip
from .clip import MEAN, STD, normalise, soften
from .data import as_float
from .muon import Muon, split_parameters

ARCHITECTURE = "vit_tiny_patch16_224"
#: What differs from timm's architecture of that name (about 1.2 M parameters).
ARGUMENTS = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
#: timm's description of the pictures the model takes.
PRETRAINED = {
    "input_size": [3, 64, 64],
    "mean": list(MEAN),
    "std": list(STD),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}

#: Scenes of a batch: half of them drawn, each followed by itself with one attribute, relation or pairing changed.
SCENES = 64
RATE = 2e-3
TEMPERATURE = 0.1
#: Of the distillation beside the contrast.
DISTILLATION = 4.0
#: Lowest and highest side of a view's cut-out, as a part of the picture's, and its pixels.
VIEW = (0.85, 1.0, 64)
#: Training scenes that the probes are fitted to.
GALLERY = 5000


def build() -> Any:
    """The untrained tower."""
    return timm.create_model(ARCHITECTURE, num_classes=0, **ARGUMENTS)


def view(images: Tensor, sides: tuple[float, float, int], generator: torch.Generator) -> Tensor:
    """A random cut-out of each image [N, 3, 64, 64] in 0 .. 1, resized, tinted, softened and grained.

    `sides` are the lowest and highest side of the cut-out as a part of the picture's, and the side in pixels of what
    comes out. Nothing is mirrored or strongly recoloured: in these scenes that makes another picture.
    """
    low, high, pixels = sides
    n = len(images)
    side = low + (high - low) * torch.rand(n, generator=generator)
    shift = (1 - side)[:, None] * (2 * torch.rand(n, 2, generator=generator) - 1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 3, pixels, pixels], align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    tint = 1 + 0.06 * torch.randn(n, 3, 1, 1, generator=generator)
    light = 1 + 0.08 * torch.randn(n, 1, 1, 1, generator=generator)
    return soften((cut * tint * light).clamp(0, 1), generator)


def reshaped(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another shape in one object's place."""
    number = int(rng.integers(len(scene.things)))
    others = [shape for shape in SHAPES if shape != scene.things[number].shape]
    thing = attrs.evolve(scene.things[number], shape=others[int(rng.integers(len(others)))])
    return attrs.evolve(scene, things=(*scene.things[:number], thing, *scene.things[number + 1 :]))


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed: half the time an object's shape, and a quarter the texture, which contrast
    learns last."""
    kind = rng.random()
    if kind < 0.5:
        return reshaped(scene, rng)
    if kind < 0.75:
        others = [texture for texture in TEXTURES if texture != scene.texture]
        return attrs.evolve(scene, texture=others[int(rng.integers(len(others)))])
    return change_one(scene, rng)


def _draw(rng: np.random.Generator) -> list[Scene]:
    """The scenes of a batch, all with training captions: scene, changed scene, scene, .."""
    scenes: list[Scene] = []
    while len(scenes) < SCENES:
        scene = sample_scene(rng, "train")
        changed = _changed(scene, rng)
        if changed.split == "train":
            scenes += [scene, changed]
    return scenes


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """InfoNCE of unit embeddings ``[N, D]`` twice: each row's partner among all others of both (SimCLR's NT-Xent)."""
    both = torch.cat([first, second])
    logits = (both @ both.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    n = len(first)
    return F.cross_entropy(logits, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))


class DinoTask:
    """Contrast of fresh training scenes, two pictures of each, and the teacher's embedding of every picture."""

    def __init__(self, folder: Path) -> None:
        """Learn from the shapes-clip exported to `folder`."""
        self.tower = build()
        self.head = nn.Linear(self.tower.num_features, clip.config()["embed_dim"])
        self.modules: dict[str, nn.Module] = {"tower": self.tower, "head": self.head}
        self.teacher: Any = clip.load(folder).requires_grad_(False)
        images, _, _ = make_split("train", 250, seed=3)
        self.centre = self._teach(normalise(as_float(images))).mean(0)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters([self.tower], lambda name: "pos_embed" in name or "patch_embed" in name)
        others += self.head.parameters()
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        scenes = _draw(rng)
        drawn = np.stack([render(scene, rng) for _ in range(2) for scene in scenes])
        images = normalise(view(as_float(torch.from_numpy(drawn)), VIEW, generator))
        features = self.tower(images)
        first, second = F.normalize(features, dim=-1).chunk(2)
        nearest = (first @ second.T).detach().argmax(1) == torch.arange(len(scenes))
        taught = F.cosine_similarity(self.head(features), self._teach(images) - self.centre).mean()
        loss = contrast(first, second) + DISTILLATION * (1 - taught)
        return loss, {"found": float(nearest.float().mean()), "taught": float(taught.detach())}

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Tensor:
        """The teacher's unit embeddings [N, 128] of normalised images."""
        embedding: Tensor = self.teacher.encode_image(images, normalize=True)
        return embedding


def load(folder: Path) -> Any:
    """The exported tower, float32, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    net = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    net.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return net.eval()


@torch.no_grad()
def embed(tower: Any, images: Tensor, batch: int = 250) -> Tensor:
    """Unit embeddings [N, 128] of images uint8 [N, 3, 64, 64]."""
    return torch.cat([F.normalize(tower(normalise(as_float(part))), dim=-1) for part in images.split(batch)])


def probe_accuracy(
    queries: Tensor, labels: list[Hashable], gallery: Tensor, known: list[Hashable], ridge: float = 1e-2
) -> tuple[float, float]:
    """How often a linear classifier, fitted to the gallery by ridge regression, names a query's label, and the same for
    always the commonest.

    Embeddings [N, D]. Nearest neighbours would not do: a held-out caption is not in the gallery, so that the nearest
    scenes are those with one thing changed, most often what counts least.
    """
    names = sorted(set(known), key=repr)
    targets = F.one_hot(torch.tensor([names.index(label) for label in known]), len(names)).double()
    x, y = (F.pad(one.double(), (0, 1), value=1.0) for one in (gallery, queries))
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
    guesses = [names[n] for n in (y @ weights).argmax(1).tolist()]
    commonest = collections.Counter(known).most_common(1)[0][0]
    right = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
    return right / len(labels), labels.count(commonest) / len(labels)


def effective_rank(embeddings: Tensor) -> float:
    """Of embeddings [N, D], 1 .. D: exp of the entropy of their normalised singular values (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    part = values / values.sum()
    return float((-(part * part.clamp(min=1e-12).log()).sum()).exp())


@torch.no_grad()
def tells_shapes(tower: Any, count: int = 1000, seed: int = 23) -> float:
    """How often another picture of a held-out scene is more alike than one with another shape in an object's place."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, "test") for _ in range(count)]
    sets = (scenes, scenes, [reshaped(scene, rng) for scene in scenes])
    one, same, other = (
        embed(tower, torch.from_numpy(np.stack([render(scene, rng) for scene in drawn]))) for drawn in sets
    )
    return float(((one * same).sum(1) > (one * other).sum(1)).float().mean())


#: What the probes are asked for; the last two in scenes of one object alone.
LABELS: dict[str, Callable[[Scene], Hashable]] = {
    "background": lambda scene: scene.background,
    "texture": lambda scene: scene.texture,
    "colour": lambda scene: scene.things[0].colour,
    "shape": lambda scene: scene.things[0].shape,
}


def evaluate(tower: Any, count: int = 1000, gallery: int = GALLERY, seed: int = 17) -> dict[str, float]:
    """What linear probes read off held-out scenes, and how far scenes are apart."""
    images, _, scenes = make_split("test", count, seed)
    others, _, known = make_split("train", gallery, seed)
    asked, found = embed(tower, images), embed(tower, others)
    numbers: dict[str, float] = {}
    for name, label in LABELS.items():
        single = name in ("colour", "shape")
        rows = [n for n, scene in enumerate(scenes) if not single or len(scene.things) == 1]
        columns = [n for n, scene in enumerate(known) if not single or len(scene.things) == 1]
        right, chance = probe_accuracy(
            asked[rows], [label(scenes[n]) for n in rows], found[columns], [label(known[n]) for n in columns]
        )
        numbers |= {f"probe_{name}": right, f"chance_{name}": chance}
    alike = asked @ asked.T
    numbers["mean_cosine"] = float((alike.sum() - alike.trace()) / (count * (count - 1)))
    numbers["effective_rank"] = effective_rank(asked)
    return numbers
