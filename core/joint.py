"""Several rewards as one: their weighted sum, which is what a value model of several branches estimates.

Every reward compares with a condition of its own. The same prompts may be given once for all that read prompts; a ready
condition for several holds each reward's tensors under ``name/``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .conditions import Condition
from .errors import ConfigError
from .loading import load_reward
from .records import name_of
from .reward import ConditionKind, Reward

Given = Condition | Sequence[Any] | Mapping[str, Any] | None
"""What rewards compare with: prompts or reference images, a ready condition, a mapping of these by name, or nothing."""

SEPARATOR = "/"
"""Between a reward's name and a tensor's in a condition for several rewards."""


def load_rewards(
    rewards: str | Reward | JointReward | Sequence[str | Reward] | Mapping[str, Reward],
    device: torch.device | str | None = None,
) -> dict[str, Reward]:
    """One or several rewards by their names, in the order given; :class:`ConfigError` for none or one given twice."""
    if isinstance(rewards, Mapping | JointReward):
        return dict(rewards.rewards if isinstance(rewards, JointReward) else rewards)
    given = [rewards] if isinstance(rewards, str | Reward) else list(rewards)
    if not given:
        raise ConfigError("no reward was given; name at least one of 'stitchvm list'.")
    loaded: dict[str, Reward] = {}
    for each in given:
        if isinstance(each, str) and each in loaded:
            raise ConfigError(f"reward {each!r} is given twice; give it once, with a larger weight.")
        reward = load_reward(each, device=device)
        if name_of(reward) in loaded:
            raise ConfigError(f"reward {name_of(reward)!r} is given twice; give it once, with a larger weight.")
        loaded[name_of(reward)] = reward
    return loaded


def checked_weights(names: Sequence[str], weights: Sequence[float] | None) -> tuple[float, ...]:
    """One finite weight a reward, 1 by default; :class:`ConfigError` for another number of them, or no numbers."""
    try:
        found = (1.0,) * len(names) if weights is None else tuple(float(weight) for weight in weights)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"weights are {weights!r}; give a number a reward, in their order.") from error
    if len(found) != len(names):
        raise ConfigError(
            f"{len(names)} rewards ({', '.join(names)}) but {len(found)} weights; give one a reward, in their order."
        )
    if not all(math.isfinite(weight) for weight in found):
        raise ConfigError(f"weights are {list(found)}; give finite numbers.")
    return found


def shares(given: Given, kinds: Mapping[str, ConditionKind]) -> dict[str, Any]:
    """What each reward gets of a condition for all, to pass to its own ``condition``; ``kinds`` are what they read.

    Raises :class:`ConfigError` for a name or tensor that belongs to none of them. What a reward lacks is left for
    itself to refuse.
    """
    if isinstance(given, str):
        raise ConfigError("condition is a single string; give a list of prompts, one a latent or one for all.")
    if isinstance(given, Mapping):
        return _by_name(given, kinds)
    if isinstance(given, Condition):
        alone = len(kinds) == 1 and not any(SEPARATOR in key for key in given.tensors)
        return dict.fromkeys(kinds, given) if alone else _unpacked(given, kinds)
    if given is None or len(kinds) == 1:
        return dict.fromkeys(kinds, given)
    kind = "prompts" if all(isinstance(item, str) for item in given) else "images"
    readers = [name for name in kinds if kinds[name] == kind] or list(kinds)
    return {name: given if name in readers else None for name in kinds}


def _by_name(given: Mapping[str, Any], kinds: Mapping[str, ConditionKind]) -> dict[str, Any]:
    missing = [name for name, kind in kinds.items() if kind != "nothing" and name not in given]
    if missing or set(given) - set(kinds):
        needed = ", ".join(name for name, kind in kinds.items() if kind != "nothing") or "none"
        raise ConfigError(
            f"conditions were given for {', '.join(given) or 'no reward'}; needed by {needed}. Give one for each of "
            "those and no other."
        )
    return {name: given.get(name) for name in kinds}


def _unpacked(given: Condition, kinds: Mapping[str, ConditionKind]) -> dict[str, Any]:
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in kinds}
    for key, tensor in given.tensors.items():
        owner, _, name = key.rpartition(SEPARATOR)
        if owner not in parts:
            raise ConfigError(
                f"the condition holds {key!r}, which belongs to none of {', '.join(kinds)}; give prompts, or a "
                "condition for each reward by its name."
            )
        parts[owner][name] = tensor
    return {name: Condition(tensors) for name, tensors in parts.items()}


def share_of(given: Condition, names: Sequence[str], *, unpacked: bool = False) -> Condition:
    """What some rewards read of a condition for several, ``unpacked`` as one reads it alone; one for a single reward
    as it is."""
    if not any(SEPARATOR in key for key in given.tensors):
        return given
    owned = {key: key.rpartition(SEPARATOR) for key in given.tensors}
    return Condition({
        name if unpacked else key: given.tensors[key] for key, (owner, _, name) in owned.items() if owner in names
    })  # fmt: skip


def packed(parts: Mapping[str, Condition]) -> Condition:
    """One condition that holds those of several rewards; one of a single sample serves as many as the others have."""
    batch = max(len(part) for part in parts.values())
    return Condition({
        f"{name}{SEPARATOR}{key}": tensor for name, part in parts.items()
        for key, tensor in part.expand(batch).tensors.items()
    })  # fmt: skip


def sum_name(names: Sequence[str], weights: Sequence[float]) -> str:
    """``"hpsv2 + 0.5 aesthetic"``: what a weighted sum is called, so that other weights have another name."""
    terms = zip(names, weights, strict=True)
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in terms)


@attrs.frozen
class JointRecord:
    """What a joint reward is called and made of, where a result says which reward it was for."""

    name: str
    licence: str
    family: str = "joint"
    repo: str | None = None
    revision: str | None = None


class JointReward:
    """The weighted sum of several rewards, for whatever rates clean images: ``Tweedie``, ``align``, ``clean_reward``.

    ``rewards`` are names or rewards (or a mapping that names them), ``weights`` one number each, 1 by default. Like a
    :class:`Reward` it has ``condition``, ``condition_kind`` and ``rate``; it cannot be cut, its parts can.
    """

    def __init__(
        self,
        rewards: Sequence[str | Reward] | Mapping[str, Reward],
        weights: Sequence[float] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.rewards = load_rewards(rewards, device)
        self.weights = checked_weights(tuple(self.rewards), weights)
        licences = (f"{name}: {getattr(r.record, 'licence', 'unknown')}" for name, r in self.rewards.items())
        self.record = JointRecord(sum_name(tuple(self.rewards), self.weights), ", ".join(licences))

    @property
    def net(self) -> nn.ModuleList:
        """The networks of all rewards, whose weights tell this one from others of the same name."""
        return nn.ModuleList(reward.net for reward in self.rewards.values())

    @property
    def kinds(self) -> dict[str, ConditionKind]:
        """What each reward compares with."""
        return {name: reward.condition_kind for name, reward in self.rewards.items()}

    @property
    def condition_kind(self) -> ConditionKind:
        """``images`` if any reward compares with reference images, else ``prompts`` if any reads prompts."""
        kinds = self.kinds.values()
        return "images" if "images" in kinds else "prompts" if "prompts" in kinds else "nothing"

    def condition(self, given: Given) -> Condition:
        """What ``rate`` needs, in one condition: from prompts for all that read prompts, or from a mapping by name.

        Raises :class:`ConfigError` when one is missing or surplus.
        """
        if isinstance(given, Condition):
            return given
        parts = shares(given, self.kinds)
        return packed({name: reward.condition(parts[name]) for name, reward in self.rewards.items()})

    def rate(self, images: Tensor, condition: Condition) -> Tensor:
        """``[B]``: the weighted sum of the rewards of ``[B, 3, H, W]`` images in [0, 1]; each pass is counted.

        Raises :class:`ConfigError` for a condition that some reward misses or none reads.
        """
        parts = _unpacked(condition, self.kinds)
        terms = zip(self.weights, self.rewards.items(), strict=True)
        return torch.stack([weight * reward.rate(images, parts[name]) for weight, (name, reward) in terms]).sum(0)


AnyReward = Reward | JointReward
"""What rates clean images."""

GivenReward = str | AnyReward | Sequence[str] | Mapping[str, float]
"""What users name a reward by: its name or itself, the names of several (weight 1 each), or their weights by name."""


def load_judges(
    rewards: str | AnyReward | Sequence[str | AnyReward], device: torch.device | str | None = None
) -> list[AnyReward]:
    """As :func:`load_judge`, each of them for itself; none for an empty list."""
    given = rewards if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]
    return [load_judge(each, device) for each in given]


def load_judge(reward: GivenReward, device: torch.device | str | None = None) -> AnyReward:
    """As :func:`load_reward`; a joint reward comes back as it is, several names become one, weight 1 each or as given.

    Raises also :class:`ConfigError` for a name given twice, for none, and for a weight that is not a finite number.
    """
    if isinstance(reward, JointReward):
        return reward
    if isinstance(reward, Mapping):
        joint = JointReward(list(reward), list(reward.values()), device=device)
        return joint if joint.weights != (1.0,) else next(iter(joint.rewards.values()))
    if isinstance(reward, Sequence) and not isinstance(reward, str):
        return load_reward(reward[0], device=device) if len(reward) == 1 else JointReward(reward, device=device)
    return load_reward(reward, device=device)
