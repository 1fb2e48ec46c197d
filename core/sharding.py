"""A network in training whose numbers are shared out over processes: torch's fully sharded data parallel (FSDP2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .slicing import Sliced


def process_mesh(device: torch.device, processes: int) -> DeviceMesh:
    """All processes of the running group, in a row."""
    return init_device_mesh(device.type, (processes,))


def shard(network: Sliced, mesh: DeviceMesh) -> None:
    """Give each process of ``mesh`` a share of every tensor of ``network``, in place.

    A module is gathered whole while it runs and no longer. Which modules are run as such, its family says. Gradients
    are means over the processes.
    """
    parts = [*network.stem_modules, *network.exit_modules, *(path for each in network.block_parts for path in each)]
    for path in parts:
        module = network.net.get_submodule(path)
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_shared(tensor: Tensor) -> bool:
    """Whether this process holds only its share."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with every process's share of it; all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole ``tensor``, the same in all processes, shared out as ``other`` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
