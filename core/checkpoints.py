"""A training's state as named tensors: what is read back goes on exactly where it was left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import shared_like, whole


def optimiser_tensors(optimiser: torch.optim.Optimizer, prefix: str = "optimiser") -> dict[str, Tensor]:
    """The optimiser's moments and step counts, by ``PREFIX.PARAMETER.NAME``."""
    tensors: dict[str, Tensor] = {}
    for index, entry in optimiser.state_dict()["state"].items():
        tensors |= {f"{prefix}.{index}.{key}": whole(torch.as_tensor(t)) for key, t in entry.items()}
    return tensors


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str = "optimiser") -> None:
    """Take what :func:`optimiser_tensors` gave; other names are left alone."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, tensor in under(prefix, tensors).items():
        index, key = name.split(".", 1)
        owner = parameters[int(index)]
        moment = tensor.shape == owner.shape
        state.setdefault(int(index), {})[key] = shared_like(tensor, owner) if moment else tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
