"""The aesthetic predictor: linear maps on shapes-clip's embedding, fitted to noisy ratings; the tower stays as it is.

As LAION's: no activations between the layers, dropout in training alone, and the embedding's direction as input.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..render import make_split
from ..scenes import Scene
from ..taste import beauty, rate
from . import clip
from .data import Pictures, as_float

#: Beside the tower's weights, which it was fitted to.
FILENAME = "aesthetic.safetensors"
#: Of the embedding and each layer's output.
WIDTHS = (128, 64, 16, 1)
#: Rated training scenes.
RATED = 12_000
BATCH = 250
RATE = 3e-3
DROPOUT = 0.05


class PredictorNet(nn.Module):
    """Unit embeddings [B, 128] to ratings [B]; its tensors have the names that StitchVM's predictor reads."""

    def __init__(self, middle: float = 0.0) -> None:
        """`middle` is the rating to start from."""
        super().__init__()
        first, second, last = (nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))
        nn.init.constant_(last.bias, middle)
        # LAION's has dropout after all but the last two layers.
        self.layers = nn.Sequential(first, nn.Dropout(DROPOUT), second, last)

    def forward(self, embedding: Tensor) -> Tensor:
        rating: Tensor = self.layers(F.normalize(embedding, dim=-1))
        return rating.squeeze(-1)


@torch.no_grad()
def embed(model: Any, images: Tensor, seed: int) -> Tensor:
    """Unit embeddings [N, 128] of images uint8 [N, 3, 64, 64], some of them softened as in shapes-clip's training."""
    generator = torch.Generator().manual_seed(seed)
    parts = [clip.normalise(clip.soften(as_float(part), generator)) for part in images.split(BATCH)]
    return torch.cat([model.encode_image(part, normalize=True) for part in parts])


class AestheticTask:
    """Squared error of the predicted against the noisy rating."""

    def __init__(self, folder: Path, pictures: Pictures, seed: int = 0) -> None:
        """Of `pictures`, seen by the shapes-clip exported to `folder`."""
        ratings = rate([Scene.parse(caption) for caption in pictures.captions], np.random.default_rng((seed, 4)))
        self.ratings = torch.from_numpy(ratings)
        self.embeddings = embed(clip.load(folder), pictures.images, seed)
        self.net = PredictorNet(float(self.ratings.mean()))
        self.modules: dict[str, nn.Module] = {"aesthetic": self.net}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.net.parameters(), lr=RATE, weight_decay=1e-4)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(self.ratings), (BATCH,), generator=generator)
        return F.mse_loss(self.net(self.embeddings[index]), self.ratings[index]), {}


def load(folder: Path) -> PredictorNet:
    """The predictor exported to shapes-clip's folder, float32, in evaluation mode."""
    net = PredictorNet()
    net.load_state_dict({key: value.float() for key, value in load_file(folder / FILENAME).items()})
    return net.eval()


@torch.no_grad()
def evaluate(folder: Path, count: int = 1000, seed: int = 13) -> dict[str, float]:
    """Rank correlation with the formula and with noisy ratings on held-out scenes, and the error in rating points.

    `spearman_raters` is the formula's own correlation with the noisy ratings: nobody can do better.
    """
    images, _, scenes = make_split("test", count, seed)
    model: Any = clip.load(folder)
    seen = torch.cat([model.encode_image(clip.normalise(as_float(part))) for part in images.split(BATCH)])
    predicted = load(folder)(seen).numpy()
    clear = np.array([beauty(scene) for scene in scenes])
    noisy = rate(scenes, np.random.default_rng((seed, 5)))
    return {
        "spearman": float(spearmanr(predicted, clear).statistic),
        "spearman_noisy": float(spearmanr(predicted, noisy).statistic),
        "spearman_raters": float(spearmanr(clear, noisy).statistic),
        "error": float(np.sqrt(np.mean((predicted - clear) ** 2))),
    }
