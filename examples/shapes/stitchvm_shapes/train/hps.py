"""The preference model: shapes-clip finetuned on choices between two pictures of one prompt, as HPSv2 was.

HPSv2 had hundreds of thousands of choices and a tiny rate. In a training as short as this one, noisy choices alone make
the model forget its captions, so each picture also has to find the caption of what it shows, as in shapes-clip's own
training. Only in that direction: the other way round, a caption would have to like a blurred picture as much as a sharp
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..preferences import Pairs, choose, draw_pairs
from . import clip
from .data import as_float
from .muon import Muon, split_parameters
from .tokens import build_tokenizer

#: Pairs in a batch: twice as many pictures.
PAIRS = 24
#: Half of shapes-clip's own.
RATE = 1e-3
#: What a prompt's two cosines are multiplied by before their softmax. Shapes-clip's own temperature, three times this,
#: is surer of itself than choices as noisy as these allow, and unlearns.
PREFERENCE_SCALE = 12.0


class HpsTask:
    """Cross-entropies on fresh pairs: of the preferred picture under the softmax of a prompt's two scaled cosines, and
    of each picture's own caption under the softmax over all captions of the batch.
    """

    def __init__(self, folder: Path) -> None:
        """Start from the shapes-clip exported to `folder`."""
        self.model: Any = clip.load(folder)
        self.tokenizer = build_tokenizer()
        self.modules: dict[str, nn.Module] = {"hps": self.model}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters([self.model], clip.is_outer)
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        pairs = draw_pairs("train", PAIRS, rng)
        texts = sorted({*pairs.captions, *pairs.shown})
        images = clip.normalise(as_float(pairs.images.flatten(0, 1)))
        image = self.model.encode_image(images, normalize=True)
        text = self.model.encode_text(clip.tokenise(self.tokenizer, texts), normalize=True)
        cosine = image @ text.T
        asked = torch.tensor([texts.index(caption) for caption in pairs.captions for _ in range(2)])
        both = PREFERENCE_SCALE * cosine.gather(1, asked[:, None]).view(-1, 2)
        chosen = choose(pairs.utilities, rng)
        preference = F.cross_entropy(both, chosen)
        logits = self.model.logit_scale.exp().clamp(max=100) * cosine
        caption = F.cross_entropy(logits, torch.tensor([texts.index(shown) for shown in pairs.shown]))
        right = (both.detach().argmax(1) == chosen).float().mean()
        numbers = {"preference": float(preference.detach()), "caption": float(caption.detach())}
        return preference + caption, {**numbers, "accuracy": float(right)}


def cosines(model: Any, tokenizer: Any, pairs: Pairs) -> Tensor:
    """Cosine similarity of each pair's two pictures with their prompt, float [N, 2]."""
    images = clip.normalise(as_float(pairs.images.flatten(0, 1)))
    image = model.encode_image(images, normalize=True).unflatten(0, (-1, 2))
    text = model.encode_text(clip.tokenise(tokenizer, pairs.captions), normalize=True)
    return (image * text[:, None]).sum(-1)


@torch.no_grad()
def evaluate(model: Any, count: int = 1000, seed: int = 11) -> dict[str, float]:
    """Agreement on `count` pairs of held-out prompts: with the utility, and with people's noisy choices.

    `labels` is how often people themselves agree with the utility; `fulfilled` and `quality` split `accuracy` into
    pairs with different numbers of wrong attributes and with the same.
    """
    rng = np.random.default_rng((seed, 1))
    tokenizer = build_tokenizer()
    right, chosen, agreed, differ = [], [], [], []
    for _ in range(-(-count // 100)):
        pairs = draw_pairs("test", 100, rng)
        best, liked = pairs.utilities.argmax(1), choose(pairs.utilities, rng)
        preferred = cosines(model, tokenizer, pairs).argmax(1)
        right.append(preferred == best)
        chosen.append(preferred == liked)
        agreed.append(liked == best)
        differ.append(pairs.wrong[:, 0] != pairs.wrong[:, 1])
    right_all, differ_all = torch.cat(right).float(), torch.cat(differ)
    return {
        "accuracy": float(right_all.mean()),
        "accuracy_fulfilled": float(right_all[differ_all].mean()),
        "accuracy_quality": float(right_all[~differ_all].mean()),
        "accuracy_noisy": float(torch.cat(chosen).float().mean()),
        "labels": float(torch.cat(agreed).float().mean()),
    }
