"""The transition that a diffusers scheduler's own step takes, for guidance to know what a shifted score makes of it."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import ConfigError
from ..kernels import Ancestral, Cps, Kernel, Ode

_MULTISTEP: dict[str, Kernel] = {"dpmsolver": Ode(), "dpmsolver++": Ode(), "sde-dpmsolver++": Ancestral()}
"""By DPM-Solver's ``algorithm_type``. The mean of ``sde-dpmsolver`` is not the forward process's posterior."""


def step_of(scheduler: Any, eta: float = 0.0) -> Kernel:
    """The transition that a diffusers scheduler's own ``step`` takes.

    Multistep schedulers (PNDM, DPM-Solver, DEIS) extrapolate from predictions that they remember: a shift of all of
    them, of the noise or of the clean latent, moves their steps as it would this transition's. ``eta`` is the call's,
    read by DDIM alone.

    Raises :class:`ConfigError` for a scheduler whose step is not known or not linear, and for an ``eta`` that it does
    not read.
    """
    # Whoever defines the method: a subclass with a step of its own takes another.
    name = next((cls for cls in type(scheduler).__mro__ if "step" in vars(cls)), type(scheduler)).__name__
    settings = scheduler.config
    steps: dict[str, Kernel | None] = {
        "FlowMatchEulerDiscreteScheduler": Cps(1.0) if settings.get("stochastic_sampling") else Ode(),
        "DDIMScheduler": Ancestral(eta),
        "DDPMScheduler": Ancestral(),
        "EulerDiscreteScheduler": Ode(),
        "EulerAncestralDiscreteScheduler": Ancestral(),
        "PNDMScheduler": Ode(),
        "DPMSolverMultistepScheduler": _MULTISTEP.get(settings.get("algorithm_type", "")),
        "DEISMultistepScheduler": Ode(),
    }
    found = steps.get(name)
    if found is None:
        kind = f" with algorithm_type={settings['algorithm_type']!r}" if name in steps else ""
        raise ConfigError(
            f"what guidance makes of a step of {name}{kind} is not known; give the pipeline one of {', '.join(steps)} "
            "(of DPM-Solver's algorithms, " + ", ".join(_MULTISTEP) + ")."
        )
    for word in ("clip_sample", "thresholding"):
        if word in inspect.signature(type(scheduler)).parameters and settings[word]:
            raise ConfigError(
                f"the {name} clips its clean latents ({word}=True), so that guidance is no shift of its steps; switch "
                f"that off: {name}.from_config(pipe.scheduler.config, {word}=False)."
            )
    if eta and name != "DDIMScheduler":
        raise ConfigError(f"eta is {eta:g}, but a {name} takes none, in the pipeline's call either; leave it out.")
    return found
