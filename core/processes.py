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

LONGEST_WAIT = timedelta(days=1)
"""For one another: shares of the same work can take hours longer than others, as when one was begun before."""


def join_group(device: torch.device, handlers: Sequence[KwargsHandler] = (), **settings: Any) -> Accelerator:
    """Accelerate's handle on the group of this process, which is left in order when the process ends.

    ``device`` says whether the group works without a GPU; ``handlers`` and ``settings`` are Accelerate's own.
    """
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[waiting, *handlers], **settings)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return accelerator


def _leave() -> None:
    """A thread of gloo's that lets go of a tensor while the interpreter is taken down aborts the process, after all is
    done and saved. NCCL has no such threads, and leaving it waits for the others, who may be waiting for a process that
    failed."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
        gc.collect()  # the threads end with the last that holds the group
