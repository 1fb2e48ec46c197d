"""Mistakes that a backbone and a reward can make alike: a mixin or a function spoils a good toy of either kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

import toys
from stitchvm.core import RewardOutput

NETWORKS: dict[str, dict[str, Callable[[], Any]]] = {"backbone": {}, "reward": {}}
GOOD = {"backbone": toys.Backbone, "reward": toys.Reward}


def _for_both(check: str) -> Any:
    """Register a function of a good network, which it spoils."""

    def register(spoil: Any) -> Any:
        for kind, cls in GOOD.items():
            NETWORKS[kind][check] = lambda cls=cls: spoil(toys.make(cls))
        return spoil

    return register


def _mixed(check: str) -> Any:
    """Register a mixin for both kinds of network."""

    def register(mixin: Any) -> Any:
        for kind, cls in GOOD.items():
            broken = type(mixin.__name__, (mixin, cls), {})
            NETWORKS[kind][check] = lambda broken=broken: toys.make(broken)
        return mixin

    return register


class Itself:
    """Its reference is its own sliced pass, so that only what else is wrong shows."""

    def upstream(self, x, condition=None):
        output = self.exit(self.run(self.stem(x, condition), 0, self.depth))
        return output.embedding if isinstance(output, RewardOutput) else output


@_for_both("frozen")
def _trainable(network):
    network.net.blocks[1].requires_grad_(True)
    return network


@_for_both("companions-apart")
def _text_encoder_as_a_sub_module(network):
    network.text_encoder = nn.Linear(2, 2).requires_grad_(False).eval()
    return network


@_for_both("all-named")
def _forgotten_module(network):
    network.net.spare = nn.Linear(2, 2).requires_grad_(False).eval()
    return network


@_mixed("upstream")
class _AnotherOutput:
    def exit(self, state):
        output = super().exit(state)
        if isinstance(output, RewardOutput):
            return attrs.evolve(output, embedding=output.embedding * 1.001)
        return output * 1.001


@_mixed("resume")
class _HiddenState(Itself):
    def stem(self, x, condition=None):
        pixels = self.input_grid(x)
        self._hidden = 1 + pixels.detach().mean((1, 2, 3)).to(self.dtype)
        return super().stem(x, condition)

    def block(self, k, state):
        state = super().block(k, state)
        if isinstance(state, tuple):
            return state[0] * self._hidden[:, None, None, None], state[1]
        return state * self._hidden[: len(state), None, None]


@_mixed("states-kept")
class _ReusesMemory:
    def block(self, k, state):
        result = super().block(k, state)
        if not torch.is_grad_enabled():
            (state[0] if isinstance(state, tuple) else state).zero_()
        return result


@_mixed("heads")
class _BorrowsFromTheExit(Itself):
    def __init__(self, net, *further):
        net.shared = nn.Linear(1, 1).requires_grad_(False).eval()
        super().__init__(net, *further)

    @property
    def exit_modules(self):
        return (*super().exit_modules, "shared")

    def block(self, k, state):
        state, bias = super().block(k, state), self.net.shared.bias
        return (state[0] + bias, state[1]) if isinstance(state, tuple) else state + bias


@_mixed("heads-own")
class _TakesABlockAlong:
    @property
    def stem_modules(self):
        return (*super().stem_modules, f"blocks.{self.depth - 1}")


@_mixed("feature-info")
class _LooksAtNumbers:
    def stem(self, x, condition=None):
        assert float(self.input_grid(x).detach().abs().max()) < 1e6
        return super().stem(x, condition)


@_mixed("gradient")
class _DetachedFeatures:
    def grid(self, state):
        return super().grid(state).detach()


@_mixed("checkpointing")
class _ForgetsTheGraph:
    def block(self, k, state):
        state = super().block(k, state)
        if not self.gradient_checkpointing:
            return state
        return (state[0].detach(), state[1]) if isinstance(state, tuple) else state.detach()


@_mixed("bfloat16")
class _AlwaysFloat32:
    dtype = torch.float32


@_mixed("global-randomness")
class _DrawsFromTheGlobalGenerator:
    def stem(self, x, condition=None):
        torch.rand(1)
        return super().stem(x, condition)
