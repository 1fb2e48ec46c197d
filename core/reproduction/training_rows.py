"""The rows of the paper's training-time alignment (paper, section 6), for whatever models a world has.

A row is data: a method with its settings, plain or stopped early. Running rows is
:mod:`stitchvm.core.reproduction.training_tables`'s part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from ..errors import ConfigError
from ..validators import whole_from


@attrs.frozen(kw_only=True)
class TrainingRow:
    """One training: ``settings`` of the method, ``training`` of :class:`~stitchvm.core.TrainSettings`.

    ``stop``: the window in which it is stopped and read by the stitched value, as shares of the sampling steps; None
    for the plain method, which maximises the clean reward. ``beside``: the plain row that it is compared with.
    """

    name: str
    label: str
    method: str
    settings: dict[str, Any] = attrs.field(factory=dict)
    training: dict[str, Any] = attrs.field(factory=dict)
    stop: tuple[float, float] | None = None
    beside: str | None = None

    def method_settings(self, steps: int) -> dict[str, Any]:
        """With the window in steps, at least 1 and at most all but the last."""
        if self.stop is None:
            return dict(self.settings)
        low, high = (min(max(round(share * steps), 1), steps - 1) for share in self.stop)
        return {**self.settings, "stop": (low, high)}


@attrs.frozen(kw_only=True)
class TrainingScale:
    """What all rows share: ``updates`` of ``prompts`` each with ``samples`` a prompt, ``steps`` of the sampler,
    ``levels`` at which DiffusionNFT reads a sample, ``evaluation_prompts`` held out, and a run for every one of the
    ``seeds``. ``windows``: where figure 7 stops, first and last of 25 steps (the paper's by default).

    Raises :class:`ConfigError` for a value out of range.
    """

    updates: int = attrs.field(default=100, validator=whole_from(1))
    prompts: int = attrs.field(default=8, validator=whole_from(1))
    samples: int = attrs.field(default=8, validator=whole_from(2))
    steps: int = attrs.field(default=10, validator=whole_from(3))
    levels: int = attrs.field(default=4, validator=whole_from(1))
    evaluate_every: int = attrs.field(default=10, validator=whole_from(1))
    evaluation_prompts: int = attrs.field(default=64, validator=whole_from(2))
    batch: int = attrs.field(default=64, validator=whole_from(1))
    learning_rate: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    windows: tuple[tuple[int, int], ...] = ((2, 12), (12, 17), (12, 25), (20, 25))

    def __attrs_post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("seeds is empty; give at least one.")
        for low, high in self.windows:
            if not 1 <= low <= high <= 25:
                raise ConfigError(f"windows has [{low}, {high}]; give the first and last of 1 to 25 steps, in order.")


NFT_STOP, DRAFT_STOP = (12 / 25, 17 / 25), (3 / 10, 7 / 10)
"""The paper's windows, as shares of the steps."""


def _draft(scale: TrainingScale, back: int) -> TrainingRow:
    settings = {"backward_steps": back, "samples_per_prompt": scale.samples}
    rate = {"learning_rate": scale.learning_rate or 1e-4, "weight_decay": 0.0}
    return TrainingRow(name=f"draft-{back}", label=f"DRaFT-{back}", method="draft", settings=settings, training=rate)


def _nft(scale: TrainingScale) -> TrainingRow:
    settings = {"samples_per_prompt": scale.samples, "mix_beta": 0.1, "levels": scale.levels}
    rate = {"learning_rate": scale.learning_rate or 3e-4}
    return TrainingRow(name="nft", label="DiffusionNFT", method="diffusion-nft", settings=settings, training=rate)


def _with_stopped(plain: TrainingRow, stop: tuple[float, float]) -> list[TrainingRow]:
    name, label = f"{plain.name}-stopped", f"{plain.label}, stopped"
    return [plain, attrs.evolve(plain, name=name, label=label, stop=stop, beside=plain.name)]


def _in_windows(plain: TrainingRow, scale: TrainingScale) -> list[TrainingRow]:
    stopped = [
        attrs.evolve(plain, name=f"{plain.name}-{low}-{high}", label=f"stopped in {low}-{high} of 25",
                     stop=(low / 25, high / 25), beside=plain.name)
        for low, high in scale.windows
    ]  # fmt: skip
    return [plain, *stopped]


def _methods(scale: TrainingScale) -> list[TrainingRow]:
    window = min(3, scale.steps - 1)  # the last step is never drawn
    fast = {"samples_per_prompt": scale.samples, "sampler": "cps", "noise_level": 0.8, "window_size": window,
            "window_range": (0, max(window, scale.steps // 2)), "clip_range": 1e-5, "kl_weight": 0.0}  # fmt: skip
    grpo = TrainingRow(name="grpo", label="Flow-GRPO-Fast", method="flow-grpo", settings=fast,
                       training={"learning_rate": scale.learning_rate or 3e-4, "inner_updates": 2})  # fmt: skip
    return [
        *_with_stopped(_draft(scale, 1), DRAFT_STOP), *_with_stopped(_draft(scale, 3), DRAFT_STOP),
        *_with_stopped(_nft(scale), NFT_STOP), grpo,
    ]  # fmt: skip


TRAINING_TABLES: dict[str, tuple[str, Callable[[TrainingScale], list[TrainingRow]], str]] = {
    "table3": ("Training-time alignment", _methods, "seconds"),
    "fig4": ("Training-time alignment, by time", _methods, "seconds"),
    "fig5": ("Training-time alignment, by denoiser passes", _methods, "passes"),
    "fig7": ("Where to stop", lambda scale: _in_windows(_nft(scale), scale), "seconds"),
    "fig7-draft": ("Where to stop DRaFT-1", lambda scale: _in_windows(_draft(scale, 1), scale), "seconds"),
}
"""By the paper's name: title, rows, and what the curves are drawn against.

``fig7-draft`` asks figure 7's question of DRaFT and is not the paper's.
"""
