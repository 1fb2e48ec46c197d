"""What :func:`~stitchvm.core.stitching.run.stitch` is told beside the pair and the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from ..errors import ConfigError
from .examples import GenerationSettings
from .search_result import Criterion


@attrs.frozen(kw_only=True)
class StitchSettings:
    """What :func:`stitch` does beside the recipe.

    ``interface`` skips the choice (the map is still fitted): backbone cut ``i`` and a block ``j`` for each reward;
    ``cuts`` and ``blocks`` bound the search; ``taps`` are earlier backbone cuts that the layer reads beside the chosen
    one, from the same pass (where they come before it); ``count`` real images and ``samples`` generated ones, drawn as
    ``generation`` says (by default from ``seed``), feed stage 2; ``resolution`` in image pixels (default the backbone's
    own). ``embedded_guidance`` is what a distilled backbone reads beside its time (FLUX; its own when None): for the
    samples, and for the head unless it comes from ``start_from``. ``conditioning`` is what the head reads of samples:
    ``null``, the null prompt alone (the paper), or ``prompt``, the one a latent is being denoised for, so that the
    value is ``E[r | z_t, prompt]``; None leaves it to the recipe's ``prompted``. With ``loras``, folders or files of
    diffusers, the samples are drawn in turn by the backbone alone and under each of them: a training against the value
    moves the sampler, and what the value says of where it moved has to be learned there.
    """

    interface: tuple[int, ...] | None = None
    cuts: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    taps: tuple[int, ...] = ()
    probes: int = attrs.field(default=200, validator=attrs.validators.gt(0))
    criterion: Criterion = "functional"
    positions: bool = False
    count: int | None = None
    samples: int = attrs.field(default=4096, validator=attrs.validators.gt(0))
    resolution: int | None = None
    embedded_guidance: float | None = None
    conditioning: Literal["null", "prompt"] | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.in_(("null", "prompt")))
    )
    loras: tuple[str | Path, ...] = ()
    batch: int = attrs.field(default=32, validator=attrs.validators.gt(0))
    seed: int = 0
    generation: GenerationSettings = attrs.field(
        default=attrs.Factory(lambda self: GenerationSettings(seed=self.seed), takes_self=True)
    )


def settings_of(given: Mapping[str, Any], chosen_by: Mapping[str, object]) -> StitchSettings:
    """The settings of a call, in which ``chosen_by`` are the arguments (None where not given) that an interface may
    come from: a search done before or an earlier value model.

    Raises :class:`ConfigError` for unknown or wrong settings, for two of these arguments, and for settings that the
    one given has already chosen.
    """
    known = {field.name for field in attrs.fields(StitchSettings)}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"stitch got unknown settings {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    sources = [name for name, source in chosen_by.items() if source is not None]
    if len(sources) > 1:
        raise ConfigError(f"stitch begins with {' or with '.join(sources)}; leave out all but one.")
    if sources and (again := sorted(_CHOSEN[sources[0]] & set(given))):
        raise ConfigError(f"stitch takes {', '.join(again)} from {sources[0]}; leave out the one or the other.")
    try:
        return StitchSettings(**given)
    except ValueError as error:
        raise ConfigError(f"stitch: {error.args[0]}.") from error


_CHOSEN = {
    "searched": {"blocks", "criterion", "cuts", "probes", "taps"},
    "start_from": {"blocks", "criterion", "cuts", "interface", "positions", "probes", "taps"},
    "transfer_from": {"blocks", "criterion", "interface", "positions", "probes"},
}
"""What each of the arguments that an interface may come from has decided."""
