"""What a network is conditioned on, as named tensors that share their batch dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from .errors import SliceError


def _same_batch(condition: Condition, attribute: object, tensors: Mapping[str, Tensor]) -> None:
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise SliceError(f"a condition's tensors must share the batch dimension, but they have {sizes}.")


@attrs.frozen(eq=False)
class Condition:
    """Named tensors ``[B, ...]``: prompt embeddings for a backbone, text embeddings or references for a reward.

    An empty mapping is the condition of a network that takes none; it fits any batch.
    """

    tensors: Mapping[str, Tensor] = attrs.field(factory=dict, validator=_same_batch)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    def expand(self, batch: int) -> Condition:
        """The same condition for ``batch`` samples; from a batch of one or of that size."""
        return Condition(self.tensors_for(batch))

    def tensors_for(self, batch: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The tensors alone for ``batch`` samples, on ``device``: what a network's stem reads.

        Unlike a frozen instance, a plain dictionary can be made inside a function that ``torch.compile`` compiles.
        Raises :class:`SliceError` unless the condition has one sample or ``batch``.
        """
        if self.tensors and len(self) not in (1, batch):
            raise SliceError(f"a condition for {len(self)} samples does not fit a batch of {batch}.")
        return {name: t.expand(batch, *t.shape[1:]).to(device or t.device) for name, t in self.tensors.items()}

    def repeat(self, times: int) -> Condition:
        """Each sample ``times`` times in a row: ``[B * times, ...]``."""
        return Condition({name: t.repeat_interleave(times, dim=0) for name, t in self.tensors.items()})

    def index(self, rows: Tensor | slice | Sequence[int]) -> Condition:
        """The chosen samples."""
        return Condition({name: _rows(t, rows) for name, t in self.tensors.items()})

    def equals(self, other: Condition) -> bool:
        """The same names with the same numbers."""
        return set(self.tensors) == set(other.tensors) and all(
            torch.equal(tensor, other[name]) for name, tensor in self.tensors.items()
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """On a device; floating tensors in ``dtype``."""
        return Condition({n: t.to(device, dtype if t.is_floating_point() else None) for n, t in self.tensors.items()})


def concatenate(parts: Sequence[Condition]) -> Condition:
    """Conditions one after the other along the batch; all must hold the same names."""
    names = set(parts[0].tensors)
    for part in parts:
        if set(part.tensors) != names:
            raise SliceError(f"cannot join conditions that hold {sorted(names)} and {sorted(part.tensors)}.")
    return Condition({name: _stacked([part[name] for part in parts]) for name in parts[0].tensors})


# One sample that stands for many, as the null prompt's does, is not copied for each of them.


def _rows(tensor: Tensor, rows: Tensor | slice | Sequence[int]) -> Tensor:
    if tensor.stride(0) != 0:
        return tensor[rows]
    return tensor[:1].expand(len(torch.arange(len(tensor), device=tensor.device)[rows]), *tensor.shape[1:])


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    first, count = tensors[0], sum(map(len, tensors))
    if all(len(one) and one.stride(0) == 0 and torch.equal(one[:1], first[:1]) for one in tensors):
        return first[:1].expand(count, *first.shape[1:])
    return torch.cat(list(tensors))
