"""The value models that a reproduction steers by, found in a folder or stitched, and what their passes cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
import torch

from ..artefact import CONFIG
from ..backbone import Backbone
from ..errors import ArtefactError
from ..planning.metering import metered
from ..records import name_of
from ..reward import Reward
from ..value import StitchedValue
from .world_values import WorldStitcher
from .worlds import cell_name


@attrs.define(eq=False)
class ValueModels:
    """``BACKBONE--REWARD`` folders under ``given``, with the value model inside or in ``stitched``, as ``matrix``
    writes them; one that is not there is stitched into ``folder/models`` and kept.

    The one that was asked for last stays loaded.
    """

    given: Path | None
    folder: Path
    stitcher: WorldStitcher
    _last: tuple[tuple[str, str], StitchedValue] | None = None
    _lost: dict[tuple[str, str], Exception] = attrs.field(factory=dict)

    def get(self, backbone: Backbone, reward: Reward) -> StitchedValue:
        """The pair's value model on ``backbone``.

        Raises ``ArtefactError`` for one of other weights or for another reward, and what ``stitch`` raises.
        """
        pair = name_of(backbone), name_of(reward)
        if pair in self._lost:
            raise self._lost[pair]  # what failed for one row is not stitched again for each of the others
        if self._last is None or self._last[0] != pair:
            self._last = None  # let go of the last one before the next is read
            try:
                self._last = (pair, self._load(backbone, reward))
            except Exception as error:
                self._lost[pair] = error
                raise
        return self._last[1]

    def _load(self, backbone: Backbone, reward: Reward) -> StitchedValue:
        asked = name_of(reward)
        folder = found_in(self.given, name_of(backbone), asked) or self.stitcher.once(backbone, reward, self.folder)
        value = StitchedValue.from_pretrained(folder, backbone=backbone, device=backbone.device)
        if value.names != (asked,):
            raise ArtefactError(f"{str(folder)!r} reads {', '.join(value.names)}; give a value model of {asked} alone.")
        return value


def found_in(given: Path | None, backbone: str, reward: str) -> Path | None:
    """Where the pair's value model is among those that ``matrix`` or ``reproduce`` left in ``given``."""
    if given is None:
        return None
    name = cell_name(backbone, reward)
    places = [root / name / inner for root in (given, given / "models") for inner in ("", "stitched")]
    return next((place for place in places if (place / CONFIG).is_file()), None)


@torch.no_grad()
def pass_costs(backbone: Backbone, reward: Reward, value: StitchedValue | None = None) -> dict[str, float] | None:
    """Floating-point operations of every kind of forward pass, in denoiser passes of ``backbone``; None where a
    denoiser pass has no operation that is counted."""
    side = backbone.native_resolution // backbone.latent_factor
    latents = torch.zeros(1, backbone.latent_channels, side, side, device=backbone.device)
    null = backbone.null_condition().to(backbone.device)
    costs = {}
    with metered() as cost:
        backbone.denoise(latents, 0.5, null)
        costs["denoiser"] = seen = cost.flops
        pixels = backbone.decode_latents(latents)
        costs["decoder"], seen = cost.flops - seen, cost.flops
        reward.judge(pixels)
        costs["reward"], seen = cost.flops - seen, cost.flops
        if value is not None:
            features = value.features(latents, 0.5)
            costs["head"], seen = cost.flops - seen, cost.flops
            value.read(features)
            costs["tail"] = cost.flops - seen
    if costs["denoiser"] == 0:
        return None
    costs["resumed"] = max(costs["denoiser"] - costs.get("head", 0), 0)
    return {kind: flops / costs["denoiser"] for kind, flops in costs.items()}


def equivalents(cost: Mapping[str, float], units: Mapping[str, float] | None) -> float | None:
    """A run's forward passes in denoiser passes; a backward pass, which gradient guidance takes, is not counted."""
    return None if units is None else sum(share * cost.get(kind, 0) for kind, share in units.items())
