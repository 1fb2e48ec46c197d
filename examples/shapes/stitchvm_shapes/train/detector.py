"""Training of the detector, on clean, blurred, grainy and autoencoded scenes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..detector import STRIDE, Detector, DetectorNet
from ..render import SIZE, place, render_placed
from ..scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, change_one, sample_scene
from .clip import soften
from .data import as_float, held_out
from .muon import Muon, split_parameters
from .vae import decode, encode

BATCH = 64
#: Pictures of a batch that pass through the autoencoder, with some noise on their latents.
CODED = 8
RATE = 3e-3
_CELLS = SIZE // STRIDE


def _targets(
    scenes: list[Scene], centres: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
) -> dict[str, Tensor]:
    """Maps of soft centres [B, 16, 16], and flat lists of each object's cell, offset and attributes."""
    axis = torch.arange(_CELLS) + 0.5
    heat = torch.zeros(len(scenes), _CELLS, _CELLS)
    rows: list[list[float]] = []
    for n, (scene, spots) in enumerate(zip(scenes, centres, strict=True)):
        for thing, (x, y) in zip(scene.things, (spots + 0.5) / STRIDE, strict=True):
            near = torch.exp(-((axis[None] - float(x)) ** 2 + (axis[:, None] - float(y)) ** 2) / (2 * 0.8**2))
            row, column = int(y), int(x)
            near[row, column] = 1.0
            heat[n] = torch.maximum(heat[n], near)
            words = [SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)]
            rows.append([n, row, column, float(x) - column, float(y) - row, *words])
    return {"heat": heat, "objects": torch.tensor(rows)}


def _centre_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Penalty-reduced focal loss of CenterNet (Zhou et al., 2019), per object."""
    probability = logits.sigmoid().clamp(1e-5, 1 - 1e-5)
    hit = heat == 1
    positive = -(((1 - probability) ** 2) * probability.log())[hit].sum()
    negative = -(((1 - heat) ** 4) * probability**2 * (1 - probability).log())[~hit].sum()
    return (positive + negative) / hit.sum()


class DetectorTask:
    """Centres, attributes and backgrounds of fresh training scenes."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.net = DetectorNet()
        self.vae = vae.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"detector": self.net}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters([self.net], lambda name: name.startswith(("cells", "ground", "stem.0")))
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    @torch.no_grad()
    def _recode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        latents = self.vae.encode(images * 2 - 1).latent_dist.mean
        amount = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator) / self.vae.config.scaling_factor
        latents = latents + amount * torch.randn(latents.shape, generator=generator)
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        scenes = [sample_scene(rng, "train") for _ in range(BATCH)]
        spots = [place(scene, rng) for scene in scenes]
        drawn = [render_placed(scene, spot, rng) for scene, spot in zip(scenes, spots, strict=True)]
        images = soften(as_float(torch.from_numpy(np.stack(drawn))), generator)
        images[:CODED] = self._recode(images[:CODED], generator)
        cells, texture, background = self.net(images)
        target = _targets(scenes, [spot.centres for spot in spots])
        n, row, column = target["objects"][:, :3].long().T
        offset, words = target["objects"][:, 3:5], target["objects"][:, 5:].long()
        loss = _centre_loss(cells["centre"][:, 0], target["heat"])
        loss = loss + F.l1_loss(cells["offset"][n, :, row, column], offset)
        for k, head in enumerate(("shape", "colour", "size")):
            loss = loss + F.cross_entropy(cells[head][n, :, row, column], words[:, k])
        loss = loss + F.cross_entropy(texture, torch.tensor([TEXTURES.index(s.texture) for s in scenes]))
        loss = loss + F.cross_entropy(background, torch.tensor([BACKGROUNDS.index(s.background) for s in scenes]))
        right = (cells["shape"][n, :, row, column].argmax(1) == words[:, 0]).float().mean()
        return loss, {"shapes": float(right)}


def evaluate(detector: Detector, vae: AutoencoderKL | None = None, count: int = 1000) -> dict[str, float]:
    """Held-out accuracy: true captions accepted, captions with one attribute changed rejected.

    With `vae`, also how many true captions are still accepted after encoding and decoding.
    """
    pictures = held_out(count)
    images = as_float(pictures.images)
    rng = np.random.default_rng(5)
    wrong = [change_one(Scene.parse(caption), rng).caption for caption in pictures.captions]
    accepted = detector.fulfilled(images, pictures.captions).float().mean()
    rejected = 1 - detector.fulfilled(images, wrong).float().mean()
    numbers = {"accepted": float(accepted), "rejected": float(rejected), "accuracy": float((accepted + rejected) / 2)}
    if vae is not None:
        coded = decode(vae, encode(vae, pictures.images))
        numbers["accepted_after_vae"] = float(detector.fulfilled(coded, pictures.captions).float().mean())
    return numbers
