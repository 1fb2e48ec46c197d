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

from .conditions import Condition
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
    names = first.condition.tensors
    condition = Condition({name: torch.cat([part.condition[name] for part in parts]) for name in names})
    state = first.part.map_state(lambda *tensors: torch.cat(tensors), *(part.state for part in parts))
    return attrs.evolve(first, x=x, condition=condition, state=state)


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
