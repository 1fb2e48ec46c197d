"""Where networks are loaded to when nobody says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

VARIABLE = "STITCHVM_DEVICE"
"""The environment variable that decides; ``stitchvm --device`` sets it."""


def default_device() -> torch.device:
    """The GPU of this process where CUDA runs, else the CPU.

    Under a launcher that is the GPU of its ``LOCAL_RANK``. ``STITCHVM_DEVICE`` names another device (``cpu``,
    ``cuda:1``, ``mps``); without it ``accelerate launch --cpu`` (``ACCELERATE_USE_CPU``) means the CPU.

    Raises :class:`ConfigError` for a device that torch does not know or cannot reach.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    if named := os.environ.get(VARIABLE):
        return _reachable(named)
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def _reachable(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}); name another by --device or {VARIABLE}, such as cpu."
        ) from error
    return device
