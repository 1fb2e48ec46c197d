"""The settings of a transition kernel, which every method that draws transitions shares."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs

from stitchvm.core import (
    KERNELS,
    ConfigError,
    FlowPath,
    Kernel,
    OnPath,
    VariancePreservingPath,
    Window,
    with_config_errors,
)

INTERPOLANTS = {"flow": FlowPath(), "variance-preserving": VariancePreservingPath()}


def rising_window(instance: Any, attribute: attrs.Attribute[Window], window: Window) -> None:
    """What can be said of a window before the steps are known; ``steps_within`` says the rest."""
    top = math.inf if instance.unit == "step" else 1
    if len(window) != 2 or not 0 <= window[0] <= window[1] <= top:
        example = "(8, 32)" if instance.unit == "step" else "(0.2, 0.8)"
        raise ConfigError(f"{attribute.name} is {window}; give two rising {instance.unit}s, such as {example}.")


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
