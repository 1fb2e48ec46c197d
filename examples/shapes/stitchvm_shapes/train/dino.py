"""The likeness model: a timm vision transformer trained without captions, by self-distillation (DINO).

Caron et al. 2021: a student sees several views of a picture and predicts what its own moving average, the teacher,
makes of the two widest. The teacher's outputs are sharpened and centred, or all would become alike: here as in DINOv2
(Oquab et al. 2023), by Sinkhorn and Knopp's iteration, with KoLeo to spread the student's embeddings besides.
"""

from __future__ import annotations

import collections
import json
import math
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
from ..scenes import Scene, sample_scene
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

SCENES = 64
#: Scenes of a batch that share their ground. When all differ, it alone tells them apart, and a training this short
#: learns nothing of the objects.
GROUP = 8
RATE = 2e-3
PROTOTYPES = 512
#: Side of a wide view's and a narrow view's cut-out, as a part of the picture (lowest, highest), and its pixels.
WIDE, NARROW = (0.85, 1.0, 64), (0.6, 0.8, 40)
NARROW_VIEWS = 1
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05
SINKHORN_ITERATIONS = 3
#: The teacher follows the student more and more slowly: 1 - 1 / (step + 1), between these.
MOMENTUM = (0.9, 0.98)
KOLEO = 0.1
#: Training scenes among which the neighbours of held-out ones are looked for.
GALLERY = 5000


def build() -> Any:
    """The untrained tower, for pictures of 64 pixels and of the size of narrow views."""
    return timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True, **ARGUMENTS)


class Projector(nn.Module):
    """Embeddings [B, 128] to logits [B, prototypes]: cosines of a hidden direction with each prototype's."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, embedding: Tensor) -> Tensor:
        return F.linear(F.normalize(self.hidden(embedding), dim=-1), F.normalize(self.prototypes, dim=-1))


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


def koleo(embedding: Tensor) -> Tensor:
    """Kozachenko and Leonenko's estimate of the entropy, negated: minus the mean log distance to the nearest other."""
    unit = F.normalize(embedding, dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).max(1).values
    return -(2 - 2 * nearest).clamp(min=1e-6).log().mean() / 2


def balanced(logits: Tensor) -> Tensor:
    """Probabilities [B, K] near softmax(logits) of which every prototype gets about as much over the batch, B / K."""
    shares = (logits - logits.max()).double().exp()
    for _ in range(SINKHORN_ITERATIONS):
        shares = shares / shares.sum(0).clamp(min=1e-300)
        shares = shares / shares.sum(1, keepdim=True)
    return shares.to(logits.dtype)


def _draw(rng: np.random.Generator) -> list[Scene]:
    """The scenes of a batch, all with training captions, in groups on one ground."""
    scenes: list[Scene] = []
    while len(scenes) < SCENES:
        scene = sample_scene(rng, "train")
        if len(scenes) % GROUP:
            scene = attrs.evolve(scene, texture=scenes[-1].texture, background=scenes[-1].background)
        if scene.split == "train":
            scenes.append(scene)
    return scenes


class DinoTask:
    """Self-distillation on fresh training scenes."""

    def __init__(self) -> None:
        student, teacher = (
            nn.ModuleDict({"tower": build(), "projector": Projector(ARGUMENTS["embed_dim"], PROTOTYPES)})
            for _ in range(2)
        )
        teacher.load_state_dict(student.state_dict())
        self.student, self.teacher = student, teacher.requires_grad_(False)
        # The teacher is a module like the other so that it is in the checkpoint.
        self.modules: dict[str, nn.Module] = {"student": student, "teacher": teacher}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters(
            [self.student], lambda name: "pos_embed" in name or "patch_embed" in name or "prototypes" in name
        )
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        momentum = min(max(1 - 1 / (step + 1), MOMENTUM[0]), MOMENTUM[1])
        for kept, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            kept.lerp_(new, 1 - momentum)

    @torch.no_grad()
    def _teach(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """The teacher's probabilities for each view."""
        logits = [self.teacher["projector"](self.teacher["tower"](one)) for one in views]
        return balanced(torch.cat(logits) / TEACHER_TEMPERATURE).chunk(len(views))

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        # Here and not after the optimiser's step, of which a task is not told.
        self._follow(step)
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        drawn = np.stack([render(scene, rng) for scene in _draw(rng)])
        images = as_float(torch.from_numpy(drawn))
        wide = [normalise(view(images, WIDE, generator)) for _ in range(2)]
        narrow = [normalise(view(images, NARROW, generator)) for _ in range(NARROW_VIEWS)]
        targets = self._teach(wide)
        seen = [self.student["tower"](torch.cat(views)).chunk(len(views)) for views in (wide, narrow)]
        embeddings = [*seen[0], *seen[1]]
        guesses = [(self.student["projector"](one) / STUDENT_TEMPERATURE).log_softmax(-1) for one in embeddings]
        losses = [
            -(target * guess).sum(-1).mean()
            for t, target in enumerate(targets)
            for g, guess in enumerate(guesses)
            if t != g
        ]
        spread = (koleo(seen[0][0]) + koleo(seen[0][1])) / 2
        entropy = -(targets[0].mean(0) * targets[0].mean(0).clamp(min=1e-12).log()).sum()
        loss = torch.stack(losses).mean() + KOLEO * spread
        return loss, {"prototypes": math.exp(float(entropy))}


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


def nearest_accuracy(
    queries: Tensor, labels: list[Hashable], gallery: Tensor, known: list[Hashable], k: int = 10
) -> tuple[float, float]:
    """How often the commonest label among a query's `k` nearest is its own, and the same for always the commonest.

    Embeddings are unit vectors [N, D]; among labels equally common the nearest one's wins. The second number is
    chance: the part of queries that have the gallery's commonest label.
    """
    nearest = (queries @ gallery.T).topk(k).indices.tolist()
    guesses = [collections.Counter(known[n] for n in row).most_common(1)[0][0] for row in nearest]
    commonest = collections.Counter(known).most_common(1)[0][0]
    right = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
    return right / len(labels), labels.count(commonest) / len(labels)


def effective_rank(embeddings: Tensor) -> float:
    """Of embeddings [N, D], 1 .. D: exp of the entropy of their normalised singular values (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    part = values / values.sum()
    return float((-(part * part.clamp(min=1e-12).log()).sum()).exp())


def _colours(scene: Scene) -> Hashable:
    return frozenset(thing.colour for thing in scene.things)


#: What the nearest neighbours are asked for; the last two in scenes of one object alone.
LABELS: dict[str, Callable[[Scene], Hashable]] = {
    "background": lambda scene: scene.background,
    "texture": lambda scene: scene.texture,
    "colours": _colours,
    "colour": lambda scene: scene.things[0].colour,
    "shape": lambda scene: scene.things[0].shape,
}


def evaluate(tower: Any, count: int = 1000, gallery: int = GALLERY, seed: int = 17) -> dict[str, float]:
    """What the neighbours of held-out scenes among training scenes know of them, and how far scenes are apart."""
    images, _, scenes = make_split("test", count, seed)
    others, _, known = make_split("train", gallery, seed)
    asked, found = embed(tower, images), embed(tower, others)
    numbers: dict[str, float] = {}
    for name, label in LABELS.items():
        single = name in ("colour", "shape")
        rows = [n for n, scene in enumerate(scenes) if not single or len(scene.things) == 1]
        columns = [n for n, scene in enumerate(known) if not single or len(scene.things) == 1]
        right, chance = nearest_accuracy(
            asked[rows], [label(scenes[n]) for n in rows], found[columns], [label(known[n]) for n in columns]
        )
        numbers |= {f"nearest_{name}": right, f"chance_{name}": chance}
    alike = asked @ asked.T
    numbers["mean_cosine"] = float((alike.sum() - alike.trace()) / (count * (count - 1)))
    numbers["effective_rank"] = effective_rank(asked)
    return numbers
