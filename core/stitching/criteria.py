"""How a pair of cuts is judged in stage 1.

- ``mse``: the paper's mean squared feature error; not comparable across ``j``, whose feature scales differ;
- ``unexplained``: that error as a share of the target's variance;
- ``functional``: ``1 - cos`` between the tail's output on the mapped features and the clean image's embedding, on
probe images
  held out from the fit: it judges what the value model will be read for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional as F

from ..branch import Interface
from ..reward import Reward
from .regression import AffineMap
from .search_result import Criterion, Probe, SearchResult

Losses = dict[Criterion, dict[tuple[int, int], float]]


def closed_form_losses(maps: dict[int, AffineMap], blocks: tuple[int, ...]) -> Losses:
    """The two criteria that come with the fit."""
    losses: Losses = {"mse": {}, "unexplained": {}}
    for i, affine in maps.items():
        width = len(affine.bias) // len(blocks)
        for position, j in enumerate(blocks):
            part = affine.outputs(slice(position * width, (position + 1) * width))
            losses["mse"][i, j] = part.mse
            losses["unexplained"][i, j] = part.unexplained
    return losses


@torch.no_grad()
def functional_losses(
    results: Mapping[str, SearchResult],
    rewards: Mapping[str, Reward],
    probes: Iterable[Probe],
    *,
    positions: bool = False,
) -> dict[str, dict[tuple[int, int], float]]:
    """``1 - cos`` of the stitched embedding with the clean one, averaged over held-out probes, for every reward and
    pair."""
    layers = {
        name: {pair: found.layer(rewards[name], pair) for pair in (Interface(*cell) for cell in found.losses["mse"])}
        for name, found in results.items()
    }
    total: dict[tuple[str, Interface], float] = defaultdict(float)
    images = 0
    for probe in probes:
        for name, reward in rewards.items():
            truth = reward.resume(reward.head(probe.pixels[name], None, 0), 0).embedding
            for pair, layer in layers[name].items():
                prefix = results[name].prefixes[pair.j].to(truth)
                state = reward.enter(layer(probe.features[pair.i]), prefix, positions=positions)
                embedding = reward.resume(state, pair.j - 1).embedding
                total[name, pair] += float((1 - F.cosine_similarity(embedding, truth)).sum())
        images += len(truth)
    return {name: {(pair.i, pair.j): total[name, pair] / images for pair in own} for name, own in layers.items()}
