"""The group of processes that a launcher started, and how one of them leaves it."""

from __future__ import annotations

import atexit
import gc
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed


def join_group(device: torch.device, **settings: Any) -> Accelerator:
    """Accelerate's handle on the group of this process, which is left in order when the process ends.

    ``settings`` are Accelerate's own; ``device`` says whether the group works without a GPU.
    """
    accelerator = Accelerator(cpu=device.type == "cpu", **settings)
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
