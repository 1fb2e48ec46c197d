"""Passes that a value model's head has begun and the sampler's next denoising step finishes.

A head runs the backbone's first blocks under a condition at a latent. When the next denoising step asks for the same
latent, noise level and condition (the unconditional branch of guidance, for a head under the null prompt), the blocks
it has run need not run again (paper, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch
from torch import Tensor

from .conditions import Condition, concatenate
from .slicing import State

if TYPE_CHECKING:
    from .backbone import Backbone, NoisyLatent

_keepers: ContextVar[tuple[PassKeeper, ...]] = ContextVar("pass_keepers", default=())


@attrs.frozen(eq=False)
class BegunPass:
    """A pass of ``part`` over ``x`` (latents ``[B, C, h, w]``) under ``condition``, stopped after block ``cut`` in
    ``state``, which keeps no gradient."""

    part: Backbone
    x: NoisyLatent
    condition: Condition
    cut: int
    state: State

    @classmethod
    def stopped(cls, part: Backbone, x: NoisyLatent, condition: Condition, cut: int, state: State) -> Self:
        """What a head leaves behind."""
        x = attrs.evolve(x, latents=x.latents.detach())
        return cls(part, x, condition, cut, part.map_state(lambda tensor: tensor.detach(), state))

    def __len__(self) -> int:
        return len(self.x.latents)

    def index(self, rows: Tensor | slice) -> BegunPass:
        """The chosen samples."""
        x = attrs.evolve(self.x, latents=self.x.latents[rows], sigma=self.x.sigma[rows])
        state = self.part.map_state(lambda tensor: tensor[rows], self.state)
        return attrs.evolve(self, x=x, condition=self.condition.index(rows), state=state)

    def answers(self, backbone: Backbone, x: NoisyLatent, condition: Condition) -> bool:
        """Whether ``backbone`` would come to the same state for this input: its very blocks, the same numbers."""
        return (
            self.part.shares_blocks(backbone, self.cut)
            and torch.equal(self.x.latents, x.latents)
            and torch.equal(self.x.sigma, x.sigma)
            and self.condition.equals(condition)
        )


def joined(parts: Sequence[BegunPass]) -> BegunPass:
    """The passes of consecutive chunks of a batch as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    x = attrs.evolve(
        first.x, latents=torch.cat([p.x.latents for p in parts]), sigma=torch.cat([p.x.sigma for p in parts])
    )
    condition = concatenate([part.condition for part in parts])
    state = first.part.map_state(lambda *tensors: torch.cat(tensors), *(part.state for part in parts))
    return attrs.evolve(first, x=x, condition=condition, state=state)


@attrs.define(eq=False)
class BegunPasses:
    """The passes that the estimator's head began last, for the denoising step that comes next.

    Where it reads more latents than go on (proposals), those of the ones still in the running are set aside as it goes,
    so that never more are held.
    """

    enabled: bool = True
    last: BegunPass | None = None
    _rows: Tensor = attrs.field(factory=lambda: torch.arange(0), init=False)
    _aside: BegunPass | None = attrs.field(default=None, init=False)

    def keep(self, parts: Sequence[BegunPass | None]) -> None:
        """One begun pass a chunk; a chunk without one leaves nothing to be finished."""
        known = [part for part in parts if part is not None]
        self.last = joined(known) if known and len(known) == len(parts) and self.enabled else None

    def set_aside(self, rows: Tensor, places: Tensor | slice = slice(None)) -> None:
        """Keep the last passes' samples at ``places`` for ``rows [n]`` of a larger batch, in place of what was set
        aside for these before."""
        last, self.last = self.last, None
        self.narrow(self._rows[~torch.isin(self._rows, rows)])
        if last is not None and len(rows):
            new = last.index(places)
            self._aside = new if self._aside is None else joined([self._aside, new])
            self._rows = torch.cat([self._rows, rows])

    def narrow(self, rows: Tensor) -> None:
        """Let go of what was set aside for any other row."""
        staying = torch.isin(self._rows, rows)
        if self._aside is not None and not bool(staying.all()):
            self._rows, self._aside = self._rows[staying], self._aside.index(staying)

    def bring_back(self, rows: Tensor) -> None:
        """Go on with what was set aside for ``rows``, in their order; with nothing unless each has something."""
        aside, known = self._aside, self._rows
        self._rows, self._aside, self.last = torch.arange(0), None, None
        if aside is not None and bool(torch.isin(rows, known).all()):
            by_row = known.argsort()
            self.last = aside.index(by_row[torch.searchsorted(known[by_row], rows)])

    def take(self, rows: int) -> BegunPass | None:
        """What was kept, if it is of so many rows; it serves once."""
        last, self.last = self.last, None
        return last if last is not None and len(last) == rows else None


@attrs.define(eq=False)
class PassKeeper:
    """``with PassKeeper() as kept: ...`` keeps the passes that value models' heads begin inside."""

    begun: list[BegunPass] = attrs.field(factory=list)
    _token: Any = attrs.field(default=None, init=False)

    def __enter__(self) -> Self:
        self._token = _keepers.set((*_keepers.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _keepers.reset(self._token)


def wanted() -> bool:
    """Whether anybody keeps begun passes."""
    return bool(_keepers.get())


def keep(begun: BegunPass) -> None:
    """Hand a begun pass to every open :class:`PassKeeper`."""
    for keeper in _keepers.get():
        keeper.begun.append(begun)
