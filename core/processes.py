"""The group of processes that a launcher started, and how one of them leaves it."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from torch import distributed

from .errors import ConfigError

LONGEST_WAIT = timedelta(days=1)
"""For one another: shares of the same work can take hours longer than others, as when one was begun before."""


def join_group(device: torch.device, handlers: Sequence[KwargsHandler] = (), **settings: Any) -> Accelerator:
    """Accelerate's handle on the group of this process, which is left in order when the process ends.

    ``device``, where this process's network is, says whether the group works without a GPU; ``handlers`` and
    ``settings`` are Accelerate's own.

    Raises :class:`ConfigError` where Accelerate refuses how the process was started, and for a network on another GPU
    than the one that the group has for this process.
    """
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[waiting, *handlers], **settings)
    except ValueError as error:
        raise ConfigError(
            f"accelerate refuses to start this process ({error}); compare what 'accelerate env' prints with how it was "
            "launched."
        ) from error
    _check_device(device, accelerator)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return accelerator


def _check_device(device: torch.device, accelerator: Accelerator) -> None:
    """A process alone may work on any of its GPUs; those of a group each have one, which their messages go through."""
    own = accelerator.device
    same = device.type == own.type and (None in (device.index, own.index) or device.index == own.index)
    if accelerator.num_processes == 1 or same:
        return
    raise ConfigError(
        f"the network is on {device}, but process {accelerator.process_index} of {accelerator.num_processes} works on "
        f"{own}. Load it there (.to({str(own)!r})), or pass its name, which is loaded where its process works."
    )


def _leave() -> None:
    """A thread of gloo's that lets go of a tensor while the interpreter is taken down aborts the process, after all is
    done and saved. NCCL has no such threads, and leaving it waits for the others, who may be waiting for a process that
    failed."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
        gc.collect()  # the threads end with the last that holds the group
