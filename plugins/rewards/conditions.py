"""What a reward's score is compared with: exactly one named tensor, or nothing."""

from __future__ import annotations

from torch import Tensor

from stitchvm.core import Condition, ConfigError, Reward


def only(condition: Condition, name: str, reward: Reward) -> Tensor:
    """``condition[name]``; :class:`ConfigError` when it is missing or comes with others that the reward does not
    read."""
    if set(condition.tensors) != {name}:
        held = ", ".join(sorted(condition.tensors)) or "nothing"
        raise ConfigError(
            f"{type(reward).__name__} compares with {name!r} (from {reward.condition_kind}), but the condition holds "
            f"{held}; make it with the reward's own condition()."
        )
    return condition[name]


def none(condition: Condition, reward: Reward) -> None:
    """:class:`ConfigError` unless the condition is empty."""
    if condition.tensors:
        held = ", ".join(sorted(condition.tensors))
        raise ConfigError(f"{type(reward).__name__} scores images alone; leave the condition ({held}) out.")
