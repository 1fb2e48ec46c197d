"""Named finetune recipes.

``paper`` is the published one, for models of hundreds of millions of parameters. ``quick`` and ``full`` are for the
small embedded world, whose networks are narrow enough for a learning rate a hundred times higher: ``quick`` sees real
images alone and keeps retrieval, ``full`` also learns from the backbone's own samples how the seeds of a prompt differ,
which takes longer and needs torch 2.9 (Muon); give it prompts. ``further`` goes on from there (``start_from``) where
the sampler itself passes; give it more samples than ``full`` had, whose seeds are known by heart by then.
"""

from __future__ import annotations

import attrs

from ..errors import ConfigError
from .finetune_settings import FinetuneSettings

_FULL = FinetuneSettings(
    optimiser="muon", steps=4000, batch_size=64, learning_rate=1e-3, layer_multiplier=1.0, matrix_multiplier=3.0,
    warmup_steps=30, schedule="cosine", hidden_weight=1.0, balance_levels=True, decoded=0.5, generated=0.5,
    on_policy=0.5, seeds_per_prompt=4, rank_weight=0.01, prompted=1.0, checkpoint_every=50,
)  # fmt: skip

RECIPES: dict[str, FinetuneSettings] = {
    "paper": FinetuneSettings(),
    "quick": FinetuneSettings(
        steps=280, batch_size=64, learning_rate=1e-3, layer_multiplier=3.0, warmup_steps=30, schedule="cosine",
    ),
    "full": _FULL,
    "further": attrs.evolve(_FULL, steps=2500, learning_rate=7e-4, generated=0.875, on_policy=0.75),
}  # fmt: skip


def recipe(name: str) -> FinetuneSettings:
    """The recipe of that name; :class:`ConfigError` lists the known ones otherwise."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
