"""What a job of sampling, training or diagnosing is given, resolved and checked: value, reward, method, prompts, size;
and what each is known by when a run goes on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from ..backbone import Backbone
from ..conditions import Condition
from ..errors import ConfigError
from ..estimators import Estimator, Stitched, Sum, Tweedie
from ..joint import AnyReward, GivenReward, JointReward, load_judge
from ..latent_space import misfit
from ..loading import load_aligner
from ..monte_carlo import MonteCarlo
from ..provenance import weights_digest
from ..records import name_of
from ..structuring import structure
from ..value import StitchedValue

Value = StitchedValue | Estimator | str | Path | None
Size = int | tuple[int, int]


_NAMED: dict[str, Callable[[AnyReward, int], Estimator]] = {
    "tweedie": lambda reward, _: Tweedie(reward),
    "monte-carlo": lambda reward, seed: MonteCarlo(reward, seed=seed),
}
"""Estimators that need nothing but the reward and a seed, by what ``value`` may be instead of a folder."""


def latent_size(backbone: Backbone, resolution: Size | None) -> tuple[int, int]:
    """Height and width of the latents of images of ``resolution`` pixels, the backbone's own by default.

    Raises :class:`ConfigError` for sides that are no multiples of what one latent covers.
    """
    asked = backbone.native_resolution if resolution is None else resolution
    factor, sides = backbone.latent_factor, (asked, asked) if isinstance(asked, int) else tuple(asked)
    if len(sides) != 2 or any(side < factor or side % factor for side in sides):
        shown = " x ".join(map(str, sides)) if sides[1:] != sides[:1] else sides[0]
        raise ConfigError(f"resolution is {shown} pixels; {name_of(backbone)} needs multiples of {factor}.")
    return sides[0] // factor, sides[1] // factor


def reward_condition(reward: AnyReward, prompts: Sequence[str]) -> Condition:
    """What ``reward`` compares the samples of ``prompts`` with; nothing where it scores images alone.

    Raises :class:`ConfigError` for a reward that compares with reference images, which prompts do not come with.
    """
    if reward.condition_kind == "images":
        raise ConfigError(f"{name_of(reward)} compares with reference images, but there are only prompts to steer by.")
    return reward.condition(list(prompts) if reward.condition_kind == "prompts" else None)


def prompts_digest(prompts: Sequence[str]) -> str:
    """What tells one list of prompts from another."""
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]


def checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts; :class:`ConfigError` for anything but strings, and for none at all."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompts must be a list of strings, got {prompts!r}.")
    if not prompts:
        raise ConfigError("prompts is empty; give at least one.")
    return tuple(prompts)


def resolve_method(method: Any, settings: dict[str, Any]) -> Any:
    """A method by its registered name with its settings, or a ready object; :class:`ConfigError` for bad settings."""
    if not isinstance(method, str):
        if settings:
            raise ConfigError(f"{type(method).__name__} is configured already; leave out {', '.join(settings)}.")
        return method
    return structure(load_aligner(method), settings, f"settings of {method}")


def resolve_value(
    value: Value, reward: GivenReward | None, backbone: Backbone, seed: int
) -> tuple[Estimator | None, AnyReward]:
    """The estimator, whose own noise if any is of ``seed``, and the clean reward: the value's own unless given.

    Raises :class:`ConfigError` for a value that cannot read the backbone's latents, one without a reward, and one of
    another reward than the given; ``ArtefactError`` for a folder without a value model that can be loaded.
    """
    given = None if reward is None else load_judge(reward, backbone.device)
    named = _NAMED.get(value) if isinstance(value, str) else None
    if isinstance(value, (str, Path)) and named is None:
        value = StitchedValue.from_pretrained(value, steers=backbone, device=backbone.device)
    estimator: Any = Stitched(value) if isinstance(value, StitchedValue) else None if named else value
    check_latents(estimator, backbone)
    own = _own_reward(estimator)
    if given is None and own is None:
        raise ConfigError("no reward to choose the best sample by; pass reward=, a name from 'stitchvm list'.")
    if given is not None and own is not None and name_of(given) != name_of(own):
        raise ConfigError(
            f"the value estimates {name_of(own)} but reward is {name_of(given)}; steering needs one and the same. "
            "Score the result's images with the other one afterwards."
        )
    final = given if given is not None else own
    assert final is not None
    return (named(final, seed) if named else estimator), final


def check_latents(estimator: Any, backbone: Backbone) -> None:
    """:class:`ConfigError` where a stitched value of ``estimator`` cannot read the latents that ``backbone`` samples.

    ``WeightsError`` where the autoencoder that it was stitched over cannot be opened to be compared.
    """
    for value in _stitched_in(estimator):
        source = value.head.part
        assert isinstance(source, Backbone)
        if reason := misfit(source, backbone, value.prompted):
            raise ConfigError(
                f"the value model of {', '.join(value.names)} was stitched to {name_of(source)} and cannot read the "
                f"samples of {name_of(backbone)}: {reason}. Stitch one to {name_of(backbone)}, or sample with "
                f"{name_of(source)}."
            )


def _stitched_in(estimator: Any) -> Iterator[StitchedValue]:
    if isinstance(estimator, Stitched):
        yield estimator.value
    elif isinstance(estimator, Sum):
        for part in estimator.estimators:
            yield from _stitched_in(part)


def _own_reward(estimator: Any) -> AnyReward | None:
    """What an estimator estimates; of a sum, what all its parts do, or the sum of what they do."""
    if isinstance(estimator, Stitched):
        return estimator.value.objective()
    if isinstance(estimator, Sum):
        rewards = [_own_reward(part) for part in estimator.estimators]
        known = [reward for reward in rewards if reward is not None]
        if len(known) < len(rewards):
            return None
        return known[0] if len({name_of(one) for one in known}) == 1 else _summed(known, estimator.weights)
    reward: AnyReward | None = getattr(estimator, "reward", None)
    return reward


def _summed(rewards: Sequence[AnyReward], weights: Sequence[float]) -> JointReward:
    """``sum_k weights_k r_k``, each reward that several of them have once."""
    found: dict[str, Any] = {}
    total: dict[str, float] = defaultdict(float)
    for reward, weight in zip(rewards, weights, strict=True):
        joint = reward if isinstance(reward, JointReward) else JointReward([reward])
        found |= joint.rewards
        for name, own in zip(joint.rewards, joint.weights, strict=True):
            total[name] += weight * own
    return JointReward(found, list(total.values()))


def estimator_identity(estimator: Estimator | None) -> Any:
    """JSON-able; two stitched values of the same name differ when their weights do."""
    if estimator is None:
        return None
    if isinstance(estimator, Stitched):
        value = estimator.value
        part, taps = value.head.part, value.head.taps
        # without taps and at its own guidance what it was before either was told, so that runs of then go on
        cuts = attrs.asdict(value.interface()) | ({"taps": list(taps)} if taps else {})
        cuts |= {} if part.guidance == part.own_guidance else {"guidance": part.guidance}
        return {"name": "Stitched", "rewards": list(value.names), **cuts, "weights": weights_digest(value.branches)}
    if isinstance(estimator, Sum):
        return {
            "name": "Sum",
            "weights": list(estimator.weights),
            "of": [estimator_identity(e) for e in estimator.estimators],
        }
    kind: Any = type(estimator)
    if not attrs.has(kind):
        return kind.__name__
    fields = {field.name: getattr(estimator, field.name) for field in attrs.fields(kind)}
    plain_ones = {name: value for name, value in fields.items() if isinstance(value, (bool, int, float, str))}
    if "kernel" in fields:
        plain_ones["kernel"] = repr(fields["kernel"])
    return {"name": kind.__name__, **plain_ones} if plain_ones else kind.__name__
