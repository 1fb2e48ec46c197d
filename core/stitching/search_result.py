"""What stage 1 finds: every pair's losses, and what is needed to build any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import attrs
from torch import Tensor

from ..branch import Branch, Interface
from ..files import write_json
from ..layer import StitchingLayer
from ..reward import Reward, Tail
from .regression import AffineMap

Criterion = Literal["mse", "unexplained", "functional"]
CRITERIA: tuple[Criterion, ...] = ("mse", "unexplained", "functional")


@attrs.frozen(eq=False)
class Probe:
    """A batch of the probe set: the clean images' pixels by reward and the noisy latents' features by cut."""

    pixels: dict[str, Tensor]
    features: dict[int, Tensor]


@attrs.frozen(eq=False)
class SearchResult:
    """Every pair's losses of one reward, by criterion, and what is needed to build any of them.

    ``losses[criterion][i, j]``; ``maps[i]`` is the closed-form map to the targets of all ``blocks`` side by side;
    ``prefixes[j]`` the mean prefix tokens ``[P, C]`` at cut ``j - 1``. A map from cut ``i`` reads the features of those
    ``taps`` that come before ``i`` as well (:func:`taps_before`).
    """

    backbone: str
    reward: str
    criterion: Criterion
    blocks: tuple[int, ...]
    losses: dict[Criterion, dict[tuple[int, int], float]]
    maps: dict[int, AffineMap]
    prefixes: dict[int, Tensor]
    probes: int
    taps: tuple[int, ...] = ()

    @property
    def loss(self) -> dict[tuple[int, int], float]:
        """``loss[i, j]`` by the chosen criterion."""
        return self.losses[self.criterion]

    @property
    def best(self) -> Interface:
        """The pair of lowest loss."""
        return Interface(*min(self.loss, key=self.loss.__getitem__))

    def map(self, interface: Interface) -> AffineMap:
        """The closed-form map of one pair."""
        width = len(self.maps[interface.i].bias) // len(self.blocks)
        start = self.blocks.index(interface.j) * width
        return self.maps[interface.i].outputs(slice(start, start + width))

    def layer(self, reward: Reward, interface: Interface) -> StitchingLayer:
        """A stitching layer that holds one pair's closed-form map."""
        affine = self.map(interface)
        c_out, c_in = affine.weight.shape
        layer = StitchingLayer(c_in, c_out, reward.grid_size).to(reward.device, reward.dtype)
        layer.load_map(affine.weight, affine.bias)
        return layer

    def branch(self, reward: Reward, interface: Interface, *, positions: bool = False) -> Branch:
        """A branch at one pair: the layer above and a copy of the reward's tail."""
        prefix = self.prefixes[interface.j].to(reward.device, reward.dtype)
        return Branch(self.layer(reward, interface), Tail(reward, interface.j, prefix, positions=positions))

    def report(self) -> dict[str, Any]:
        """JSON-able: the best pair and the grid as rows ``{i, j, mse, unexplained, functional}``."""
        grid = [{"i": i, "j": j, **{c: loss[i, j] for c, loss in self.losses.items()}} for i, j in self.loss]
        taps = {"taps": list(self.taps)} if self.taps else {}
        return {"backbone": self.backbone, "reward": self.reward, "criterion": self.criterion, "probes": self.probes,
                "best": attrs.asdict(self.best), **taps, "grid": grid}  # fmt: skip

    def save(self, path: Path) -> None:
        """Write ``report()`` as JSON, atomically."""
        write_json(path, self.report())


@attrs.frozen(eq=False)
class JointSearch:
    """Several rewards' results from one pass over the probe set; their value model shares one head.

    A backbone cut is judged by the sum over rewards of each one's criterion, every reward entered at the block that is
    best for it there. The rewards' weights play no part: each branch is to be as good as it can. Of the criteria only
    ``mse`` differs in scale between rewards, so that one of them would decide alone.
    """

    results: dict[str, SearchResult]

    @property
    def loss(self) -> dict[int, float]:
        """``loss[i]``: the sum over rewards at backbone cut ``i``."""
        cuts = next(iter(self.results.values())).maps
        return {i: sum(found.loss[i, self._block(found, i)] for found in self.results.values()) for i in cuts}

    @property
    def best(self) -> dict[str, Interface]:
        """Where to cut for each reward: at the common ``i`` of lowest loss."""
        i = min(self.loss, key=self.loss.__getitem__)
        return {name: Interface(i, self._block(found, i)) for name, found in self.results.items()}

    @staticmethod
    def _block(found: SearchResult, i: int) -> int:
        return min(found.blocks, key=lambda j: found.loss[i, j])

    def report(self) -> dict[str, Any]:
        """JSON-able: the common best cut, the sum by backbone cut and each reward's own report; of a single reward its
        own report."""
        reports = [found.report() for found in self.results.values()]
        if len(reports) == 1:
            return reports[0]
        shared: dict[str, Any] = {
            key: reports[0][key] for key in ("backbone", "criterion", "probes", "taps") if key in reports[0]
        }
        best = {"i": next(iter(self.best.values())).i, "j": {name: cut.j for name, cut in self.best.items()}}
        loss = [{"i": i, "loss": loss} for i, loss in self.loss.items()]
        return {**shared, "best": best, "loss": loss, "rewards": reports}

    def save(self, path: Path) -> None:
        """Write ``report()`` as JSON, atomically."""
        write_json(path, self.report())
