"""The settings of a transition kernel, which every method that draws transitions shares."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
from torch import Tensor

from stitchvm.core import (
    KERNELS,
    ConfigError,
    FlowPath,
    Kernel,
    OnPath,
    StepUnit,
    VariancePreservingPath,
    Window,
    steps_within,
    with_config_errors,
)

INTERPOLANTS = {"flow": FlowPath(), "variance-preserving": VariancePreservingPath()}


def rising_window(instance: Any, attribute: attrs.Attribute[Window | None], window: Window | None) -> None:
    """What can be said of a window before the steps are known; ``steps_within`` says the rest."""
    if window is None:
        return
    top = math.inf if instance.unit == "step" else 1
    if len(window) != 2 or not 0 <= window[0] <= window[1] <= top:
        example = "(8, 32)" if instance.unit == "step" else "(0.2, 0.8)"
        raise ConfigError(f"{attribute.name} is {window}; give two rising {instance.unit}s, such as {example}.")


def in_fractions(first: float, last: float) -> Any:
    """The default of a window of :class:`WindowedSettings`: these fractions of the steps, None in any other unit,
    where :meth:`WindowedSettings.steps_inside` asks for it."""
    return attrs.Factory(lambda known: (first, last) if known.unit == "fraction" else None, takes_self=True)


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class KernelSettings:
    """``kernel``: ``ode``, ``ancestral`` (``eta``), ``sde`` (``diffusion``, ``scale``) or ``cps`` (``noise_level``);
    unset parameters are the kernel's own. ``interpolant`` takes the steps on another path than the backbone's.

    Raises :class:`ConfigError` for a parameter the kernel does not have.
    """

    kernel: Literal["ode", "ancestral", "sde", "cps"] = attrs.field(
        default="sde", validator=attrs.validators.in_(tuple(KERNELS))
    )
    diffusion: Literal["square", "sigma", "constant", "paper", "grpo"] | None = None
    scale: float | None = None
    eta: float | None = None
    noise_level: float | None = None
    interpolant: Literal["flow", "variance-preserving"] | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.in_(tuple(INTERPOLANTS)))
    )

    def __attrs_post_init__(self) -> None:
        self.transition_kernel()

    def refuse_ode(self, reason: str) -> None:
        """For methods that choose among draws, or shift them."""
        if self.kernel == "ode":
            raise ConfigError(f"the ode kernel draws no noise, so {reason}; use sde or ancestral.")

    def transition_kernel(self) -> Kernel:
        """The kernel with the parameters that were set."""
        kind = KERNELS[self.kernel]
        names = ("diffusion", "scale", "eta", "noise_level")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        known = {field.name for field in attrs.fields(kind)}
        if surplus := sorted(set(given) - known):
            has = ", ".join(sorted(known)) or "no parameters"
            raise ConfigError(f"kernel {self.kernel!r} has no {' or '.join(surplus)}; it has {has}.")
        kernel: Kernel = kind(**given)
        return kernel if self.interpolant is None else OnPath(kernel, INTERPOLANTS[self.interpolant])


@attrs.frozen(kw_only=True, field_transformer=with_config_errors)
class WindowedSettings(KernelSettings):
    """``unit`` of the settings' windows: ``fraction`` of the steps, ``step`` numbers or ``sigma`` levels."""

    unit: StepUnit = attrs.field(default="fraction", validator=attrs.validators.in_(("fraction", "step", "sigma")))

    def steps_inside(self, name: str, sigmas: Tensor, *, include_end: bool = True) -> list[int]:
        """The steps in the window called ``name``.

        Raises :class:`ConfigError` for one left at its default where ``unit`` is not that of the default, for one that
        is no part of the schedule, and for one that holds no step though its ends differ.
        """
        window, unit = getattr(self, name), self.unit
        if window is None:
            example = "(6, 22)" if unit == "step" else "(0.5, 0.95)"
            raise ConfigError(
                f"unit is {unit!r}, but {name}'s default is in fractions of the steps; give {name} in the same unit, "
                f"such as {example}."
            )
        inside = steps_within(sigmas, window, unit, include_end=include_end)
        if not inside and window[0] < window[1]:
            raise ConfigError(
                f"{name} {window[0]:g} to {window[1]:g} ({unit}) holds none of the {len(sigmas) - 1} steps; widen it, "
                "or take more steps."
            )
        return inside
