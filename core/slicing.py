"""The one abstraction: a network as stem -> block 1 .. block n -> exit, cut after any block.

Backbones and rewards share :class:`Sliced`; search, finetune, value models and cost accounting know nothing else about
a network. Cut ``k`` means "after block k", cut ``0`` "after the stem" and cut ``LATENT`` (-1) "before the stem": the
input itself, which is what VAE stitching reads.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import SliceError
from .grids import side_by_side

LATENT = -1
"""The cut before the stem: the network's own input as a feature grid (the VAE-stitching baseline)."""

State = Any
"""A family's running state between two blocks; generic code sees it through ``grid`` and ``map_state`` alone."""


@attrs.frozen
class FeatureInfo:
    """What one cut hands to a stitching layer, in timm's words.

    ``num_chs`` channels; ``reduction`` input pixels (latent pixels for a backbone) per grid cell along one side.
    """

    cut: int
    name: str
    num_chs: int
    reduction: int


class Sliced(nn.Module, ABC):
    """A network that can be run from any cut to any other.

    A family names its modules (``stem_modules``, ``block_modules`` ordered, ``exit_modules``, ``enter_modules``:
    dotted paths of modules or parameters inside ``net``) and writes ``stem``, ``block``, ``exit`` and ``grid`` over
    the upstream modules; one whose blocks are several modules each also names those (``block_parts``). Everything
    else is generic. What belongs to a model without being cut (a VAE, text encoders) hangs on ``companions``, outside
    the module tree: a head or a tail does not take it along. ``record`` is the registry's entry it was loaded from, or
    None.

    The rule every family is tested for: ``exit(run(stem(x, c), 0, depth))`` equals the upstream ``forward`` and
    ``resume(head(x, c, k), k)`` equals it for every ``k``, bit for bit in float32 on the CPU.
    """

    enter_modules: ClassVar[tuple[str, ...]] = ()
    unbatched_state: ClassVar[tuple[str, ...]] = ()
    """Fields of the family's state whose tensors have no batch dimension."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.companions: Any = None
        self.record: Any = None
        self.gradient_checkpointing = False

    # -- what a family writes -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def stem_modules(self) -> tuple[str, ...]:
        """Dotted paths, inside ``net``, of what ``stem`` uses."""

    @property
    @abstractmethod
    def block_modules(self) -> tuple[str, ...]:
        """Dotted path, inside ``net``, of every block in order; block ``k`` is entry ``k - 1`` and named by it."""

    @property
    def block_parts(self) -> tuple[tuple[str, ...], ...]:
        """Dotted paths, inside ``net``, of all that every block uses: its entry in ``block_modules`` and nothing else,
        unless a family says otherwise (a UNet's resnet and the attention after it share no module of their own)."""
        return tuple((path,) for path in self.block_modules)

    @property
    @abstractmethod
    def exit_modules(self) -> tuple[str, ...]:
        """Dotted paths, inside ``net``, of what ``exit`` uses."""

    @abstractmethod
    def stem(self, x: Any, condition: Any) -> State:
        """The state at cut 0."""

    @abstractmethod
    def block(self, k: int, state: State) -> State:
        """The state at cut ``k`` from the one at ``k - 1``; ``k = 1 .. depth``."""

    @abstractmethod
    def exit(self, state: State) -> Any:
        """The network's output from the state at cut ``depth``."""

    @abstractmethod
    def grid(self, state: State) -> Tensor:
        """``[B, C, H, W]``: the spatial features of a state."""

    @abstractmethod
    def example(self, batch: int = 1) -> tuple[Any, Any]:
        """An ``(x, condition)`` of the right shapes on the parameters' device; zeros, for geometry only."""

    def upstream(self, x: Any, condition: Any) -> Tensor:
        """What the upstream network's own ``forward`` makes of the same input: what slicing is held to, in float32.

        A backbone's output, a reward's embedding ``[B, D]``. Written over ``net`` alone and in another way than
        ``stem``, ``block`` and ``exit``, or else it proves nothing. A family without an upstream model leaves it out
        and says so in ``Family.lacks``. Raises :class:`NotImplementedError` there.
        """
        raise NotImplementedError(f"{type(self).__name__} has no upstream() to be compared with.")

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """With random weights (none on ``"meta"``), in eval mode and frozen, from a record's table."""
        raise NotImplementedError(f"{cls.__name__} has no build().")

    def weights(self) -> nn.Module:
        """Everything that is trained, as a checkpoint of one file holds it: ``net``, unless there are companions."""
        return self.net

    # -- generic ----------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of blocks of the whole network, whatever has been pruned away."""
        return len(self.block_modules)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    def check_cut(self, cut: int, lowest: int = LATENT) -> None:
        """Raise :class:`SliceError` unless ``lowest <= cut <= depth``."""
        if not lowest <= cut <= self.depth:
            raise SliceError(f"{type(self).__name__}: cut {cut} is out of range; choose {lowest} to {self.depth}.")

    def run(self, state: State, start: int, stop: int) -> State:
        """Blocks ``start + 1 .. stop``."""
        for k in range(start + 1, stop + 1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                state = checkpoint(self.block, k, state, use_reentrant=False)
            else:
                state = self.block(k, state)
        return state

    def head(self, x: Any, condition: Any, cut: int) -> State:
        """Stem and blocks ``1 .. cut``; the input itself at ``LATENT``."""
        self.check_cut(cut)
        return x if cut == LATENT else self.run(self.stem(x, condition), 0, cut)

    def resume(self, state: State, cut: int) -> Any:
        """Finish the pass that ``head(x, condition, cut)`` began, for ``cut >= 0``."""
        self.check_cut(cut, lowest=0)
        return self.exit(self.run(state, cut, self.depth))

    def map_state(self, change: Callable[..., Tensor], *states: State) -> State:
        """The state whose batched tensors are ``change(*tensors)`` of those of ``states``.

        A state is a tensor, or an attrs class, tuple or dictionary of tensors, None and plain numbers; what is no
        tensor, and the fields in ``unbatched_state``, come from the first. A family with another kind of state
        overrides this. Raises :class:`SliceError` for one that has not.
        """
        first = states[0]
        if isinstance(first, Tensor):
            return change(*states)
        if first is None or isinstance(first, (bool, int, float, str)):
            return first
        if type(first) is tuple:
            return tuple(self.map_state(change, *parts) for parts in zip(*states, strict=True))
        if type(first) is dict:
            return {key: self.map_state(change, *(state[key] for state in states)) for key in first}
        if not attrs.has(type(first)):
            raise SliceError(f"{type(self).__name__}: a state holds a {type(first).__name__}; override map_state.")
        names = [field.name for field in attrs.fields(type(first)) if field.name not in self.unbatched_state]
        changed = {name: self.map_state(change, *(getattr(state, name) for state in states)) for name in names}
        return attrs.evolve(first, **changed)

    def shares_blocks(self, other: Sliced, cut: int) -> bool:
        """Whether stem and blocks ``1 .. cut`` are the very modules of ``other``: sharing tensors, not equal ones."""
        paths = self.tensor_prefixes(0, cut)
        return bool(paths) and all(
            (ours := _lookup(self.net, path)) is not None and ours is _lookup(other.net, path) for path in paths
        )

    def features(self, x: Any, condition: Any) -> Iterator[tuple[int, Tensor]]:
        """``(cut, grid)`` at every cut ``0 .. depth`` from a single pass."""
        state = self.stem(x, condition)
        yield 0, self.grid(state)
        for k in range(1, self.depth + 1):
            state = self.run(state, k - 1, k)
            yield k, self.grid(state)

    def feature_info(self) -> list[FeatureInfo]:
        """Per cut, name, channels and reduction: from a pass on the meta device, with no memory and no weights.

        Raises :class:`SliceError` for a pruned network, whose later cuts no longer exist.
        """
        if any(_lookup(self.net, path) is None for path in self.block_modules):
            raise SliceError(f"{type(self).__name__}: feature_info needs the whole network; this one was pruned.")
        twin = self.to_meta()
        x, condition = twin.example()
        side = twin.input_grid(x).shape[-1]
        names = ("stem", *self.block_modules)
        with torch.no_grad():
            return [
                FeatureInfo(cut, names[cut], grid.shape[1], side // grid.shape[-1])
                for cut, grid in twin.features(x, condition)
            ]

    def input_grid(self, x: Any) -> Tensor:
        """The input as ``[B, C, H, W]``, the grid at ``LATENT``; a family whose input is not a tensor overrides it."""
        return x

    def to_meta(self) -> Self:
        """The same network on the meta device, sharing nothing."""

        def empty(tensor: Tensor) -> Tensor:
            bare = torch.empty_like(tensor, device="meta")
            return nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare

        with torch.device("meta"):
            return self.with_tensors(empty)

    def sharing(self) -> Self:
        """The same network with modules of its own over the same tensors: what is put into one is not in the other."""
        return self.with_tensors(lambda tensor: tensor)

    def with_tensors(self, replacement: Callable[[Tensor], Tensor]) -> Self:
        """The same network over modules of its own, every tensor of ``net`` replaced; companions are shared."""
        twin = copy.copy(self)
        _own_dicts(twin)
        memo: dict[int, Any] = {id(t): replacement(t) for t in (*self.net.parameters(), *self.net.buffers())}
        twin.net = copy.deepcopy(self.net, memo)
        return twin

    def prune(self, start: int, stop: int, *, enter: bool = False) -> Self:
        """A part that shares this network's tensors and owns only what it runs.

        The stem when ``start`` is 0 and not ``enter``; ``enter_modules`` when ``enter``; blocks ``start + 1 .. stop``;
        the exit when ``stop`` is ``depth`` and ``enter`` (a head never needs it). State-dict keys are a subset of the
        whole's.
        """
        self.check_cut(start)
        self.check_cut(stop)
        owned = {path for parts in self.block_parts[max(start, 0) : max(stop, 0)] for path in parts}
        if enter:
            owned |= {*self.enter_modules, *self.exit_modules}
        elif stop >= 0:
            owned |= set(self.stem_modules)
        part = copy.copy(self)
        _own_dicts(part)
        part.companions = None
        part.net = _subset(self.net, owned, "")
        return part

    def tensor_prefixes(self, start: int, stop: int) -> tuple[str, ...]:
        """Name prefixes, inside ``net``, of the tensors a head from ``start`` to ``stop`` reads."""
        if stop < 0:
            return ()
        stem = self.stem_modules if start == 0 else ()
        return (*stem, *(path for parts in self.block_parts[start:stop] for path in parts))


def _own_dicts(module: nn.Module) -> None:
    """Give a shallow copy its own tables, so that changing it leaves the original whole."""
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(module, table, dict(getattr(module, table)))


def _subset(module: nn.Module, owned: set[str], prefix: str) -> nn.Module:
    """A shallow copy of ``module`` that keeps only ``owned`` paths; dropped blocks become parameterless
    placeholders."""
    part = copy.copy(module)
    _own_dicts(part)
    for name, child in module._modules.items():
        path = prefix + name
        if path in owned or child is None:
            continue
        if any(other.startswith(path + ".") for other in owned):
            part._modules[name] = _subset(child, owned, path + ".")
        else:
            part._modules[name] = nn.Identity() if isinstance(module, nn.ModuleList) else None
    for name in module._parameters:
        if prefix + name not in owned:
            part._parameters[name] = None
    return part


def _lookup(net: nn.Module, path: str) -> nn.Module | Tensor | None:
    """The module or tensor at ``path``, or None where it was pruned away."""
    here: Any = net
    for name in path.split("."):
        here = getattr(here, name, None)
        if here is None or isinstance(here, nn.Identity):
            return None
    return here


class Head(nn.Module):
    """A network's first part as a module of its own: FSDP, offload and ``torch.compile`` hook its ``forward``.

    ``forward(x, condition) -> [B, C, H, W]``, with ``return_state`` the state as well. Owns only the stem and blocks
    ``1 .. cut``; nothing at all at ``LATENT``. With ``taps``, earlier cuts, the grid holds their features before those
    at the cut (:func:`~stitchvm.core.grids.side_by_side`), from the same pass.
    """

    def __init__(self, network: Sliced, cut: int, taps: Sequence[int] = ()) -> None:
        super().__init__()
        network.check_cut(cut)
        self.part = network.prune(0, cut)
        self.cut = cut
        self.taps = checked_taps(network, taps, cut)

    def forward(self, x: Any, condition: Any, *, return_state: bool = False) -> Any:
        if self.cut == LATENT:
            return (self.part.input_grid(x), x) if return_state else self.part.input_grid(x)
        start, grids = 0, []
        state = self.part.stem(x, condition)
        for stop in (*self.taps, self.cut):
            state, start = self.part.run(state, start, stop), stop
            grids.append(self.part.grid(state))
        grid = side_by_side(grids)
        return (grid, state) if return_state else grid


def checked_cuts(network: Sliced, cuts: Sequence[int] | None) -> tuple[int, ...]:
    """``cuts``, by default after every block; :class:`SliceError` for one that the network has not."""
    found = tuple(range(1, network.depth + 1)) if cuts is None else tuple(cuts)
    for cut in found:
        network.check_cut(cut)
    return found


def checked_taps(network: Sliced, taps: Sequence[int], cut: int) -> tuple[int, ...]:
    """``taps`` in order, without repeats; :class:`SliceError` unless each is a cut from 0 that comes before ``cut``."""
    found = tuple(sorted(set(taps)))
    for tap in found:
        network.check_cut(tap, lowest=0)
        if tap >= cut:
            raise SliceError(f"{type(network).__name__}: tap {tap} is not before the cut at {cut}; leave it out.")
    return found


def taps_before(taps: Sequence[int], cut: int) -> tuple[int, ...]:
    """Those ``taps`` that a layer at ``cut`` reads beside the features there: none after it, none at the latent."""
    return tuple(tap for tap in taps if tap < cut)
