"""Named finetune recipes.

``paper`` is the published one, for models of hundreds of millions of parameters; ``quick`` and ``full`` are first
guesses for the small embedded world, whose networks are narrow enough for a learning rate thirty times higher.
"""

from __future__ import annotations

from .errors import ConfigError
from .finetune import FinetuneSettings

RECIPES: dict[str, FinetuneSettings] = {
    "paper": FinetuneSettings(),
    "quick": FinetuneSettings(
        steps=250, batch_size=32, learning_rate=3e-4, layer_multiplier=3.0, warmup_steps=20, schedule="cosine",
        generated=0.25,
    ),
    "full": FinetuneSettings(
        steps=3000, batch_size=64, learning_rate=3e-4, layer_multiplier=3.0, warmup_steps=100, schedule="cosine",
        generated=0.5, checkpoint_every=200,
    ),
}  # fmt: skip


def recipe(name: str) -> FinetuneSettings:
    """The recipe of that name; :class:`ConfigError` lists the known ones otherwise."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
