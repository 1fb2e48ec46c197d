"""The reward model: an open_clip model that scores how well a picture fits a caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from ..render import render
from ..scenes import MAX_TOKENS, Scene, change_one, sample_scene
from .data import Pictures, as_float
from .muon import Muon, split_parameters
from .tokens import END, build_tokenizer

#: Pairs of a scene and its hard negative in a batch: twice as many pictures.
PAIRS = 32
RATE = 2e-3
MEAN, STD = (0.44, 0.41, 0.33), (0.25, 0.24, 0.27)


def config() -> dict[str, Any]:
    """The open_clip model configuration (about 2.8 M parameters)."""
    tokenizer = build_tokenizer()
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 6, "width": 160, "head_width": 32},
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "width": 128,
            "heads": 4,
            "layers": 4,
            "hf_tokenizer_name": "shapes-clip",
            "pool_type": "eos",
            "eos_id": tokenizer.convert_tokens_to_ids(END),
            "pad_id": tokenizer.convert_tokens_to_ids(END),
        },
        "custom_text": True,
    }


def build() -> CustomTextCLIP:
    """The untrained model."""
    settings = {key: value for key, value in config().items() if key != "custom_text"}
    return CustomTextCLIP(**settings)


def normalise(images: Tensor) -> Tensor:
    """Images float 0 .. 1 as the tower expects them."""
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur some images a little and add grain to some: a reward must not hang on the renderer's last bit."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = (torch.rand(n, 1, 1, 1, generator=generator) - 0.5).clamp(min=0) * 2
    grain = (torch.rand(n, 1, 1, 1, generator=generator) - 0.5).clamp(min=0) * 0.12
    noise = torch.randn(images.shape, generator=generator)
    return (images.lerp(blurred, amount) + grain * noise).clamp(0, 1)


def _draw(rng: np.random.Generator) -> list[Scene]:
    """A training scene and one that differs in a single attribute, both with training captions."""
    scene = sample_scene(rng, "train")
    while (other := change_one(scene, rng)).split != "train":
        pass
    return [scene, other]


def is_outer(name: str) -> bool:
    """Whether a parameter is an input's or output's, which Muon is not made for."""
    return "embedding" in name or "conv1" in name or name.endswith("text_projection")


class ClipTask:
    """Contrastive training on fresh scenes, each with its hard negative in the same batch."""

    def __init__(self) -> None:
        self.model = build()
        self.tokenizer = build_tokenizer()
        self.modules: dict[str, nn.Module] = {"clip": self.model}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters([self.model], is_outer)
        return [
            Muon(matrices, RATE),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        scenes = [scene for _ in range(PAIRS) for scene in _draw(rng)]
        images = as_float(torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])))
        image = self.model.encode_image(normalise(soften(images, generator)), normalize=True)
        text = self.model.encode_text(tokenise(self.tokenizer, [s.caption for s in scenes]), normalize=True)
        logits = self.model.logit_scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(len(scenes))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = (logits.detach().argmax(1) == target).float().mean()
        return loss, {"accuracy": float(right)}


def tokenise(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids int64 [B, 24]."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


@torch.no_grad()
def embed(model: Any, tokenizer: Any, pictures: Pictures, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Unit image and text embeddings [N, 128] of pictures and their captions."""
    images = [model.encode_image(normalise(as_float(part)), normalize=True) for part in pictures.images.split(batch)]
    ids = tokenise(tokenizer, pictures.captions)
    texts = [model.encode_text(part, normalize=True) for part in ids.split(batch)]
    return torch.cat(images), torch.cat(texts)


def recall(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Retrieval recall@1 in both directions among N pairs."""
    scores = images @ texts.T
    target = torch.arange(len(scores))
    return {
        "image_to_text_recall_at_1": float((scores.argmax(1) == target).float().mean()),
        "text_to_image_recall_at_1": float((scores.argmax(0) == target).float().mean()),
    }


def load(folder: Path) -> nn.Module:
    """The exported model, float32, in evaluation mode."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}", precision="fp32")
    return model.eval()
