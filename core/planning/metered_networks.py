"""What the parts of a backbone and a reward cost at full size, from one pass each on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from ..backbone import Backbone, NoisyLatent
from ..branch import Branch, Interface
from ..errors import SliceError
from ..layer import StitchingLayer
from ..loading import as_dtype
from ..reward import Reward, Tail
from ..slicing import Head, Sliced, taps_before
from ..stitching.finetune_settings import FinetuneSettings
from ..stitching.objectives import distillation_loss
from .metering import metered

META = torch.device("meta")

Shape = tuple[int, int, int]


@attrs.frozen
class Cost:
    """Of one network or part: ``parameters``, their ``bytes`` (and the buffers') in the precision they are loaded in,
    ``flops`` of one sample's pass and ``activations``, the bytes that live at its peak beside weights and inputs."""

    parameters: int
    bytes: int
    flops: int
    activations: int


@attrs.frozen(eq=False)
class MeteredBackbone:
    """A backbone's costs a sample: of the head at every cut, of the whole network, and of its VAE's halves.

    ``grids[i] = (C, H, W)`` is what cut ``i`` hands over.
    """

    backbone: Backbone
    latents: NoisyLatent
    condition: Any
    grids: tuple[Shape, ...]
    heads: tuple[Cost, ...]
    whole: Cost
    encoder: Cost
    decoder: Cost

    @classmethod
    def of(cls, backbone: Backbone, resolution: int | None = None) -> Self:
        """Meter a backbone on the meta device at ``resolution`` image pixels (its own by default).

        Its weights are put in its record's precision, as loading does; the VAE stays in float32. Raises
        :class:`SliceError` for a resolution that it cannot read.
        """
        nn.Module.to(backbone.net, as_dtype(backbone.record.dtype))  # diffusers' own warns of what loading does too
        factor, side = backbone.latent_factor, resolution or backbone.native_resolution
        if side < factor or side % factor:
            raise SliceError(f"resolution is {side}; choose a multiple of {factor} pixels.")
        example, condition = backbone.example()
        latents = torch.zeros(1, backbone.latent_channels, side // factor, side // factor, device=META)
        x = attrs.evolve(example, latents=latents)
        grids, heads, whole = _cuts(backbone, x, condition)
        pixels = torch.zeros(1, 3, side, side, device=META)
        encoder = _vae_half(lambda: backbone.encode_images(pixels))
        decoder = _vae_half(lambda: backbone.decode_latents(latents))
        return cls(backbone, x, condition, grids, heads, whole, encoder, decoder)

    def read_at(self, cut: int, taps: Sequence[int] = ()) -> Shape:
        """What a layer at ``cut`` reads with those ``taps`` that come before it, at the finest one's resolution."""
        grids = [self.grids[read] for read in (*taps_before(taps, cut), cut)]
        height, width = max((height, width) for _, height, width in grids)
        return sum(channels for channels, *_ in grids), height, width


@attrs.frozen(eq=False)
class MeteredReward:
    """A reward's costs a sample: ``starts[k]`` of its stem and blocks ``1 .. k``, and of the whole tower, in float32 as
    it is loaded; ``width`` channels of its grid."""

    reward: Reward
    width: int
    starts: tuple[Cost, ...]
    whole: Cost

    @classmethod
    def of(cls, reward: Reward) -> Self:
        """Meter a reward on the meta device."""
        pixels, condition = reward.example()
        grids, starts, whole = _cuts(reward, pixels, condition)
        return cls(reward, grids[0][0], starts, whole)

    def tail_flops(self, j: int) -> int:
        """Of the tower from block ``j`` on."""
        return self.whole.flops - self.starts[j - 1].flops


@attrs.frozen(eq=False)
class MeteredValue:
    """A value model's costs a sample: of the stitching ``layer`` and the ``tail``, of the whole ``value`` without a
    gradient, and of one example's share of a ``training`` step: the head forward, layer and tail forward and back."""

    layer: Cost
    tail: Cost
    value: Cost
    training: Cost

    @classmethod
    def of(cls, left: MeteredBackbone, right: MeteredReward, interface: Interface, taps: Sequence[int] = ()) -> Self:
        """Meter a pair joined at ``interface``, reading the ``taps`` before it too; :class:`SliceError` where one of
        the two has no such cut."""
        left.backbone.check_cut(interface.i, lowest=0)
        right.reward.check_cut(interface.j - 1, lowest=0)
        head = Head(left.backbone, interface.i, taps_before(taps, interface.i))
        branch = _branch(left.read_at(interface.i, taps), right, interface.j)
        with torch.no_grad(), metered() as read:
            features = head(left.latents, left.condition).float()
            layer = -read.flops
            mapped = branch.layer(features)
            layer, tail = layer + read.flops, -read.flops
            output = branch.tail(mapped)
            tail += read.flops
        value = Cost(*_size(head, branch), read.flops, read.peak)
        target = {"embedding": output.embedding, "tokens": output.tokens}
        del mapped, output
        # gradients are as large as weights, whatever the batch: they are let go and counted with the weights
        for parameter in branch.requires_grad_(True).parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with metered() as trained:
            distillation_loss(branch(features), target, FinetuneSettings()).backward()
        # the head's own activations are gone before the branch begins, its features are not
        held = features.nbytes + sum(tensor.nbytes for tensor in target.values())
        training = Cost(*_size(branch), read.flops - layer - tail + trained.flops, trained.peak + held)
        return cls(Cost(*_size(branch.layer), layer, 0), Cost(*_size(branch.tail), tail, 0), value, training)


def layer_cost(grid: Shape, right: MeteredReward) -> Cost:
    """Of a stitching layer between a backbone's ``grid`` and a reward."""
    with META:
        layer, features = StitchingLayer(grid[0], right.width, right.reward.grid_size), torch.zeros(1, *grid)
    with torch.no_grad(), metered() as cost:
        layer(features)
    return Cost(*_size(layer), cost.flops, cost.peak)


def _branch(grid: Shape, right: MeteredReward, j: int) -> Branch:
    """A layer that reads ``grid`` and a tail from block ``j`` on, on the meta device."""
    reward = right.reward
    with META:
        layer = StitchingLayer(grid[0], right.width, reward.grid_size)
        tail = Tail(reward, j, torch.zeros(reward.prefix_count, right.width))
    return Branch(layer, tail).requires_grad_(False)  # torch's counter trips over a trainable tensor without a graph


def _cuts(network: Sliced, x: Any, condition: Any) -> tuple[tuple[Shape, ...], tuple[Cost, ...], Cost]:
    """Every cut's grid, the cost of what comes before it, and the whole network's, from one pass."""
    grids, parts = [], []
    with torch.no_grad(), metered() as cost:
        state = network.stem(x, condition)
        for cut in range(network.depth + 1):
            state = network.run(state, cut - 1, cut) if cut else state
            # a head ends in its grid, which may be a copy of what the state holds
            channels, height, width = network.grid(state).shape[1:]
            grids.append((channels, height, width))
            parts.append(Cost(*_size(network.prune(0, cut).net), cost.flops, cost.peak))
        network.exit(state)
    return tuple(grids), tuple(parts), Cost(*_size(network.net), cost.flops, cost.peak)


def _vae_half(run: Callable[[], Tensor]) -> Cost:
    """What ``run`` costs; a VAE that is opened on first use is opened before, and takes no memory either."""
    with META, torch.no_grad():
        run()
        with metered() as cost:
            run()
    return Cost(*cost.read, cost.flops, cost.peak)


def _size(*modules: nn.Module) -> tuple[int, int]:
    """Parameters, and bytes of parameters and buffers."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values()
    return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)), sum(t.nbytes for t in tensors)
