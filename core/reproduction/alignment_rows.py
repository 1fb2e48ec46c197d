"""The rows of the paper's inference-time alignment (paper, section 5), for whatever models a world has.

A row is data: a method, what estimates its value, and settings of :func:`~stitchvm.core.align`. Running rows is
:mod:`stitchvm.core.reproduction.alignment_tables`'s part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import attrs

from ..errors import ConfigError
from ..records import MetricKind
from ..validators import one_of, whole_from

PLAIN = "plain"
"""The row that every gain is paired with."""

NORMALISERS = ("raw", "norm", "rms-ratio", "epsilon", "unit-rms")

_KERNEL = ("kernel", "diffusion", "scale", "eta", "noise_level", "interpolant")
"""What the plain sampler by another kernel shares with the methods that use it."""

# Strengths are in inverse units of the reward: cosines of one prompt's seeds differ by about 0.01, ratings by 0.3. A
# stitched value's gradient is the smaller one: the paper, too, sweeps it higher.
_PER_COSINE = (10.0, 30.0, 100.0, 300.0)
_PER_RATING = {"tweedie": (0.3, 1.0, 3.0, 10.0), "stitched": (3.0, 10.0, 20.0, 30.0)}
_PER_UNIT = {"unit-rms": (0.1, 0.3, 1.0, 3.0), "norm": (3.0, 10.0, 30.0, 100.0), "rms-ratio": (0.3, 1.0, 3.0, 10.0)}
_TILT = {"rank": 2.0}

CURVE = (1, 2, 4, 8, 14)
"""Figure 3: particles without proposals."""
PROPOSED = ((4, 2), (8, 2), (8, 6))
"""Figure 3: particles, and proposals a particle."""


@attrs.frozen(kw_only=True)
class Row:
    """One method of a table.

    ``settings`` are keywords of ``align``: particles, proposals and the method's own. Rows of one ``curve`` differ in
    what ``at`` is (a strength, or the number of particles). ``source`` is the backbone whose value model steers, None
    for the steered one itself.
    """

    name: str
    label: str
    method: str
    value: Literal["none", "tweedie", "stitched"] = "none"
    settings: dict[str, Any] = attrs.field(factory=dict)
    curve: str | None = None
    at: float | None = None
    source: str | None = None


def _strengths(value: Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    found = tuple(dict.fromkeys(float(strength) for strength in value))
    if not found or not all(math.isfinite(strength) and strength > 0 for strength in found):
        raise ConfigError(f"strengths are {list(value)}; give positive numbers, such as 10,30,100.")
    return found


@attrs.frozen(kw_only=True)
class Settings:
    """What all rows share, and what a table's rows are made of.

    ``prompts`` held-out ones; ``guidance_scale`` and ``embedded_guidance`` as in ``align``, the latter for the
    backbones that read any; ``batch`` bounds the samples of one network pass and changes nothing else. ``particles``
    and ``proposals`` of the particle methods, whose ``strength`` (in inverse units of the reward, like the sweeps of
    gradient guidance ``strengths_tweedie`` and ``strengths_stitched``) follows the reward's metric when None.
    ``normaliser`` scales the gradient. ``methods`` adds a table's optional rows, ``options`` are further settings of
    its main method.

    Raises :class:`ConfigError` for a value out of range.
    """

    prompts: int = attrs.field(default=200, validator=whole_from(1))
    steps: int = attrs.field(default=20, validator=whole_from(1))
    guidance_scale: float | None = None
    embedded_guidance: float | None = None
    seed: int = 0
    batch: int = attrs.field(default=64, validator=whole_from(1))
    particles: int = attrs.field(default=4, validator=whole_from(1))
    proposals: int = attrs.field(default=2, validator=whole_from(1))
    strength: float | None = None
    strengths_tweedie: tuple[float, ...] | None = attrs.field(default=None, converter=_strengths)
    strengths_stitched: tuple[float, ...] | None = attrs.field(default=None, converter=_strengths)
    normaliser: str = attrs.field(default="raw", validator=one_of(NORMALISERS))
    methods: tuple[str, ...] = ()
    options: dict[str, Any] = attrs.field(factory=dict)

    def tilt(self, metric: MetricKind) -> float:
        """The strength of particle methods for a reward that is measured by ``metric``."""
        return _TILT.get(metric, 60.0) if self.strength is None else self.strength

    def sweep(self, value: str, metric: MetricKind) -> tuple[float, ...]:
        """The strengths of gradient guidance by the estimator ``value``."""
        given = self.strengths_tweedie if value == "tweedie" else self.strengths_stitched
        usual = _PER_RATING[value] if metric == "rank" else _PER_COSINE
        return given or _PER_UNIT.get(self.normaliser, usual)

    def kernel(self) -> dict[str, Any]:
        """The part of ``options`` that chooses the transition kernel."""
        return {name: self.options[name] for name in _KERNEL if name in self.options}


@attrs.frozen
class Pair:
    """What the rows are for: a reward measured by ``metric``, and the ``others`` of the steered backbone's world."""

    metric: MetricKind
    others: tuple[str, ...] = ()


@attrs.frozen
class Table:
    """A table or figure: its ``title``, its rows, the method that ``options`` are settings of, the ``further`` methods
    it can show, and whether the best row of a curve is marked. ``ignored`` names the settings that no row reads,
    ``of_further`` those that rows of the further methods alone do."""

    title: str
    make: Callable[[Settings, Pair], list[Row]]
    main: str
    further: tuple[str, ...] = ()
    best: bool = False
    ignored: tuple[str, ...] = ()
    of_further: tuple[str, ...] = ()

    def unread(self, methods: Sequence[str]) -> tuple[str, ...]:
        """Names of the settings that change no row of it, shown with these further ``methods``."""
        return self.ignored if methods else self.ignored + self.of_further


def _plain() -> Row:
    return Row(name=PLAIN, label="plain sampler", method="sample")


def _undisturbed(settings: Settings) -> Row:
    """What the steered rows' kernel samples unsteered: their gain over the plain ODE is not all the value's."""
    off = {"strength": 0.0, "window": (0.0, 0.0), "particles": 1}
    kernel = settings.kernel()
    label = f"plain sampler, {kernel.get('kernel', 'sde')} kernel"
    return Row(name="kernel", label=label, method="dps", settings={**kernel, **off})


def _best_of(count: int) -> Row:
    return Row(name=f"best-of-{count}", label=f"best of {count}", method="best-of-n", settings={"particles": count})


WORDS = {"tweedie": "Tweedie", "stitched": "stitched"}


def _dps(settings: Settings, value: Any, strength: float, source: str | None = None) -> Row:
    whose = f" of {source}" if source else ""
    return Row(
        name=f"dps-{value}-{strength:g}" + (f"-from-{source}" if source else ""),
        label=f"DPS, {WORDS[value]}{whose}, {strength:g}", method="dps", value=value, source=source,
        settings={**settings.options, "strength": strength, "normaliser": settings.normaliser, "particles": 1},
        curve=value + (f"-from-{source}" if source else ""), at=strength,
    )  # fmt: skip


def _fk(
    settings: Settings, metric: MetricKind, value: Any, particles: int, proposals: int, source: str | None = None
) -> Row:
    name = f"fk-{value}-n{particles}" + (f"-m{proposals}" if proposals > 1 else "")
    size = f"N = {particles}" + (f", M = {proposals}" if proposals > 1 else "")
    whose = f" of {source}" if source else ""
    return Row(
        name=name + (f"-from-{source}" if source else ""), label=f"FK, {WORDS[value]}{whose}, {size}",
        method="fk-steering", value=value, source=source,
        settings={"strength": settings.tilt(metric), **settings.options, "particles": particles,
                  "proposals": proposals},
        curve="proposals" if proposals > 1 else "particles", at=float(particles),
    )  # fmt: skip


def _gradients(settings: Settings, pair: Pair) -> list[Row]:
    return [
        _plain(), _undisturbed(settings),
        *(_dps(settings, value, strength) for value in ("tweedie", "stitched")
          for strength in settings.sweep(value, pair.metric)),
    ]  # fmt: skip


def _particle_methods(settings: Settings, pair: Pair) -> list[Row]:
    many, metric = settings.particles, pair.metric
    rows = [_plain(), _undisturbed(settings), _best_of(many), _fk(settings, metric, "tweedie", many, 1),
            _fk(settings, metric, "stitched", many, 1)]  # fmt: skip
    if settings.proposals > 1:
        rows.append(_fk(settings, metric, "stitched", many, settings.proposals))
    if "svdd" in settings.methods:
        chosen = {**settings.kernel(), "particles": 1, "proposals": many}
        label = f"SVDD, stitched, M = {many}"
        rows.append(Row(name=f"svdd-m{many}", label=label, method="svdd", value="stitched", settings=chosen))
    if "das" in settings.methods:
        twisted = {**settings.kernel(), "particles": many, "strength": settings.tilt(metric)}
        label = f"DAS, stitched, N = {many}"
        rows.append(Row(name=f"das-n{many}", label=label, method="das", value="stitched", settings=twisted))
    return rows


def _scaling(settings: Settings, pair: Pair) -> list[Row]:
    sizes = [(count, 1) for count in CURVE] + list(PROPOSED)
    return [_plain(), *(_fk(settings, pair.metric, "stitched", many, each) for many, each in sizes)]


def _transfer(settings: Settings, pair: Pair) -> list[Row]:
    rows = [_plain()]
    for source in (None, *pair.others):
        rows.append(_fk(settings, pair.metric, "stitched", settings.particles, settings.proposals, source))
        if "dps" in settings.methods:
            guided = attrs.evolve(settings, options=settings.kernel())
            sweep = settings.sweep("stitched", pair.metric)
            rows += [_dps(guided, "stitched", strength, source) for strength in sweep]
    return rows


_OF_STITCHED_GRADIENTS = ("strengths_stitched", "normaliser")
_OF_GRADIENTS = ("strengths_tweedie", *_OF_STITCHED_GRADIENTS)
_OF_PARTICLES = ("particles", "proposals", "strength")

TABLES: dict[str, Table] = {
    "table1": Table("Gradient guidance", _gradients, "dps", best=True, ignored=_OF_PARTICLES),
    "table2": Table("Particle methods", _particle_methods, "fk-steering", ("svdd", "das"), ignored=_OF_GRADIENTS),
    "fig3": Table(
        "Reward against cost", _scaling, "fk-steering", ignored=(*_OF_GRADIENTS, "particles", "proposals")
    ),
    "table6": Table(
        "Value models of other backbones", _transfer, "fk-steering", ("dps",), ignored=("strengths_tweedie",),
        of_further=_OF_STITCHED_GRADIENTS,
    ),
}  # fmt: skip
"""By the paper's name."""


def table_of(name: str, settings: Settings) -> Table:
    """The table; :class:`ConfigError` for an unknown one, or for further methods it does not show."""
    if name not in TABLES:
        raise ConfigError(f"unknown table {name!r}; choose one of {', '.join(TABLES)}.")
    table = TABLES[name]
    if unknown := [method for method in settings.methods if method not in table.further]:
        known = ", ".join(table.further) or "none"
        raise ConfigError(f"{name} cannot show {', '.join(unknown)}; its further methods: {known}.")
    return table


def check_rows(asked: Iterable[str], table: str, known: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a name that is not one of the table's rows."""
    if unknown := sorted(set(asked) - set(known)):
        raise ConfigError(f"{table} has no row {', '.join(unknown)}; choose from {', '.join(known)}.")
