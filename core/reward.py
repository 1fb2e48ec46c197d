"""A reward model: a sliced image tower that ends in an embedding or a score, and the tail a value model keeps of it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from .conditions import Condition
from .costs import count
from .errors import ConfigError, SliceError
from .records import ConditionKind, RewardRecord
from .slicing import Sliced, State
from .weights_file import read_weights


@attrs.frozen(eq=False)
class RewardOutput:
    """What a reward's tower ends in.

    ``tokens [B, N, C]`` after the last norm; ``embedding [B, D]``, not normalised; ``score [B]`` for a reward whose
    score needs no condition, else None.
    """

    tokens: Tensor
    embedding: Tensor
    score: Tensor | None = None


class Reward(Sliced):
    """A :class:`Sliced` tower whose ``x`` is preprocessed pixels ``[B, 3, S, S]``; its blocks take no condition.

    A family sets ``image_size`` (pixels, square), ``grid_size`` (patches along a side), ``prefix_count`` (CLS and
    register tokens) and ``condition_kind`` (what ``score`` compares with).
    """

    image_size: int
    grid_size: int
    prefix_count: int
    condition_kind: ConditionKind

    @classmethod
    def from_pretrained(
        cls,
        record: RewardRecord,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """As :meth:`Backbone.from_pretrained`, always whole; the file is the record's ``filename``."""
        network = cls.build(record.architecture)
        read_weights(network, record, token=token, local_files_only=local_files_only)
        return network.to(device, dtype)

    def upstream(self, x: Tensor, condition: object = None) -> Tensor:
        """``[B, D]``: what ``net`` itself returns for preprocessed pixels; a family whose embedding is something else
        overrides it."""
        output: Tensor = self.net(x)
        return output

    @abstractmethod
    def preprocess(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to the tower's normalised pixels, differentiable."""

    @abstractmethod
    def prefix(self, state: State) -> Tensor:
        """``[B, prefix_count, C]``: the non-patch tokens of a state."""

    @abstractmethod
    def enter(self, grid: Tensor, prefix: Tensor, *, positions: bool = False) -> State:
        """A state from patch features ``[B, C, grid_size, grid_size]`` and prefix tokens ``[prefix_count, C]``.

        ``enter(grid(s), prefix(s))`` gives ``s`` back: features at a cut already carry their positions. ``positions``
        adds the positional embedding once more, which is how the paper's sentence (C.1) can be read.
        """

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """The text side, one sample a prompt, cacheable; a reward without one raises ``ConfigError``."""

    @abstractmethod
    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        """``[B]``: the reward, higher is better, from the tower's output and the condition."""

    def tokens(self, state: State) -> Tensor:
        """``[B, prefix_count + N, C]``: a state's prefix tokens and its patch features, row by row."""
        return torch.cat([self.prefix(state), self.grid(state).flatten(2).transpose(1, 2)], dim=1)

    def hidden_states(self, state: State, cut: int) -> tuple[State, list[Tensor]]:
        """The state at ``depth`` from the one at ``cut``, and the :meth:`tokens` after every block on the way."""
        found = []
        for k in range(cut + 1, self.depth + 1):
            state = self.run(state, k - 1, k)
            found.append(self.tokens(state))
        return state, found

    def check_grid(self, grid: Tensor) -> None:
        """Raise :class:`SliceError` unless the patch grid has this tower's size."""
        if grid.shape[-2:] != (self.grid_size, self.grid_size):
            raise SliceError(
                f"{type(self).__name__} reads a {self.grid_size}x{self.grid_size} patch grid, got {list(grid.shape)}."
            )

    def judge(self, images: Tensor) -> RewardOutput:
        """The whole tower on ``[B, 3, H, W]`` images in [0, 1] (clamped), counted as ``reward``."""
        count("reward", len(images))
        return self.resume(self.head(self.preprocess(images.clamp(0, 1)), None, 0), 0)

    def rate(self, images: Tensor, condition: Condition) -> Tensor:
        """``[B]``: the reward of ``[B, 3, H, W]`` images in [0, 1] against a ready condition."""
        return self.score(self.judge(images), condition)

    def condition(self, prompts: Sequence[str] | Condition | None) -> Condition:
        """What ``score`` needs, from prompts, from a ready condition, or from nothing.

        Raises :class:`ConfigError` when a condition is missing or surplus.
        """
        if self.condition_kind == "nothing":
            if prompts is not None and not (isinstance(prompts, Condition) and not prompts.tensors):
                raise ConfigError(f"{type(self).__name__} scores images alone; leave the condition out.")
            return Condition()
        if prompts is None:
            raise ConfigError(f"{type(self).__name__} needs a condition ({self.condition_kind}), none was given.")
        return prompts if isinstance(prompts, Condition) else self.encode_prompts(list(prompts))


class Tail(nn.Module):
    """A reward from block ``j`` on, with prefix tokens of its own: ``[B, C, g, g]`` at cut ``j - 1`` to the output.

    The tensors are copies: finetuning a tail leaves the reward it came from alone. ``prefix [prefix_count, C]`` starts
    as the mean of the reward's own prefix tokens at that cut, and is learnable.
    """

    def __init__(self, reward: Reward, j: int, prefix: Tensor, *, positions: bool = False) -> None:
        super().__init__()
        reward.check_cut(j - 1, lowest=0)
        self.part = copy.deepcopy(reward.prune(j - 1, reward.depth, enter=True))
        self.j = j
        self.positions = positions
        self.prefix = nn.Parameter(prefix.detach().clone())

    def forward(self, grid: Tensor, *, return_hidden: bool = False) -> Any:
        """:class:`RewardOutput`; with ``return_hidden`` also the tokens after every block (:meth:`hidden_states`)."""
        self.part.check_grid(grid)
        state = self.part.enter(grid, self.prefix, positions=self.positions)
        if not return_hidden:
            return self.part.resume(state, self.j - 1)
        last, hidden = self.part.hidden_states(state, self.j - 1)
        return self.part.exit(last), hidden
