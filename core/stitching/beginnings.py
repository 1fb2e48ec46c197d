"""What stage 2 begins with: the closed form at the best of a search's interfaces, or an earlier value of the pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from ..artefact import Provenance
from ..backbone import Backbone
from ..branch import Branch, Interface
from ..errors import ConfigError
from ..images import ImageSource
from ..records import name_of
from ..reward import Reward
from ..slicing import Head, taps_before
from ..value import StitchedValue
from .search_result import JointSearch, SearchResult
from .searching import search_jointly
from .stitch_settings import StitchSettings


def run_search(
    backbone: Backbone,
    rewards: Mapping[str, Reward],
    source: ImageSource,
    settings: StitchSettings,
    progress: bool = True,
) -> JointSearch:
    """Stage 1 under these settings; a fixed ``interface`` is only fitted, not compared."""
    cuts: Sequence[int] | None = settings.cuts
    blocks: Any = settings.blocks
    if (fixed := fixed_interfaces(settings.interface, rewards)) is not None:
        cuts, blocks = settings.interface[:1], {name: (cut.j,) for name, cut in fixed.items()}  # type: ignore[index]
    return search_jointly(
        backbone, rewards, images=source, cuts=cuts, blocks=blocks, taps=settings.taps, probes=settings.probes,
        criterion=settings.criterion, positions=settings.positions, resolution=settings.resolution,
        batch=settings.batch, seed=settings.seed, progress=progress,
    )  # fmt: skip


def closed_form(
    backbone: Backbone,
    rewards: Mapping[str, Reward],
    found: JointSearch,
    weights: Sequence[float] | None,
    settings: StitchSettings,
) -> StitchedValue:
    """The best value model without training, or the one at a given interface, the search in its provenance."""
    cuts = fixed_interfaces(settings.interface, rewards) or found.best
    value = joined(backbone, rewards, found.results, cuts, weights, positions=settings.positions)
    value.provenance = Provenance(search=found.report())
    return value


def joined(
    backbone: Backbone,
    rewards: Mapping[str, Reward],
    results: Mapping[str, SearchResult],
    cuts: Mapping[str, Interface],
    weights: Sequence[float] | None = None,
    *,
    positions: bool = False,
) -> StitchedValue:
    """The closed-form value model before stage 2: one head, one branch a reward, cut at ``cuts`` (of one ``i``)."""
    branches: dict[str, Branch] = {}
    for name, reward in rewards.items():
        branches[name] = results[name].branch(reward, cuts[name], positions=positions)
        for parameter in branches[name].parameters():
            parameter.requires_grad_(True)
    (i,) = {cut.i for cut in cuts.values()}
    (taps,) = {taps_before(found.taps, i) for found in results.values()}
    return StitchedValue(Head(backbone, i, taps), branches, backbone.null_condition(), weights, rewards)


def initial_value(
    backbone: Backbone, reward: Reward, result: SearchResult, interface: Interface, *, positions: bool = False
) -> StitchedValue:
    """The closed-form value model of one reward at one interface, before stage 2."""
    name = name_of(reward)
    return joined(backbone, {name: reward}, {name: result}, {name: interface}, positions=positions)


def begun(
    start_from: str | Path, backbone: Backbone, rewards: Mapping[str, Reward], weights: Sequence[float] | None
) -> StitchedValue:
    """A saved value model to be trained further, what made it in its provenance; :class:`ConfigError` when it is of
    other rewards."""
    earlier = StitchedValue.from_pretrained(start_from, backbone=backbone, device=backbone.device)
    check_rewards(earlier, start_from, rewards)
    branches: dict[str, Any] = dict(zip(earlier.names, earlier.branches.requires_grad_(True), strict=True))
    made = Provenance(search={"start_from": {"path": str(start_from), **attrs.asdict(earlier.provenance)}})
    weights = earlier.weights if weights is None else weights
    return StitchedValue(earlier.head, branches, backbone.null_condition(), weights, rewards, made)


def known_search(searched: SearchResult | JointSearch | None, rewards: Mapping[str, Reward]) -> JointSearch | None:
    """An earlier search; :class:`ConfigError` when it was for other rewards."""
    if searched is None:
        return None
    joint = JointSearch({searched.reward: searched}) if isinstance(searched, SearchResult) else searched
    if set(joint.results) != set(rewards):
        raise ConfigError(f"the search was for {', '.join(joint.results)}, but the value is for {', '.join(rewards)}.")
    return JointSearch({name: joint.results[name] for name in rewards})


def fixed_interfaces(interface: tuple[int, ...] | None, rewards: Mapping[str, Reward]) -> dict[str, Interface] | None:
    """A given interface by reward: ``(i, j, ...)``, one block a reward in their order."""
    if interface is None:
        return None
    if len(interface) != 1 + len(rewards):
        raise ConfigError(
            f"interface is {tuple(interface)}; give a backbone cut and one block for each of {', '.join(rewards)}."
        )
    return {name: Interface(interface[0], j) for name, j in zip(rewards, interface[1:], strict=True)}


def check_rewards(value: StitchedValue, folder: str | Path, rewards: Mapping[str, Reward]) -> None:
    """:class:`ConfigError` for a saved value model of other ``rewards``."""
    if value.names != tuple(rewards):
        raise ConfigError(
            f"{str(folder)!r} is a value model of {', '.join(value.names)}, but {', '.join(rewards)} is asked for."
        )
