"""What a pass costs, operator by operator: floating-point operations, memory, and the weights it reads.

On the meta device nothing is computed and nothing stored, so that a network of any size is metered in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _flash_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _addmm_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


# torch counts every flash attention but the CPU's, and no product that is added in place
_UNCOUNTED: dict[Any, Callable[..., int]] = {
    _FLASH: _flash_flops,
    _FLASH_BACKWARD: _flash_backward_flops,
    torch.ops.aten.addmm_: _addmm_flops,
}


@attrs.define(eq=False)
class Metered:
    """What happened inside :func:`metered`, up to now.

    ``peak`` counts bytes of what was created inside and lived at one time, results included, without an operator's own
    workspace; ``read`` is ``(elements, bytes)`` of what existed before and was read: weights and inputs.
    """

    _counter: FlopCounterMode
    _memory: _Memory

    @property
    def flops(self) -> int:
        """Two a multiply and add, of matrix products, convolutions and attention, backward passes included."""
        return int(self._counter.get_total_flops())

    @property
    def peak(self) -> int:
        return self._memory.peak

    @property
    def read(self) -> tuple[int, int]:
        sizes = [(storage.nbytes(), width) for storage, width in self._memory.outside.values()]
        return sum(size // width for size, width in sizes), sum(size for size, _ in sizes)


@contextmanager
def metered() -> Iterator[Metered]:
    """``with metered() as cost: ...`` meters torch operators of this thread, on real tensors or meta ones.

    Attention is taken to be fused, as it is on the devices that matter: it stores no table of scores.
    """
    counter, memory = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED), _Memory()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer, which no counter sees into
    try:
        with counter, memory, _FusedAttention():
            yield Metered(counter, memory)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Memory(TorchDispatchMode):
    """Bytes of the storages that operators create, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.outside: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._inside: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._inside:
                self.outside.setdefault(storage._cdata, (storage, tensor.element_size()))
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._inside or key in self.outside:
            return
        self._inside.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._inside.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _FusedAttention(TorchFunctionMode):
    """Attention through the fused operator, which the meta device would otherwise write out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    result: Tensor = _FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result
