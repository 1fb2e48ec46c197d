"""Stable Diffusion 3.5 Medium with CLIP ViT-L/14 at 336 pixels and a value model stitched from both, in their
registered architectures, with random weights: what a pass costs does not depend on what was learnt.

Nothing is downloaded and no text encoder is needed: prompt embeddings are random numbers of the right shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stitchvm import core
from stitchvm.core import AlignProblem, Backbone, Condition, Denoiser, Estimator, Head, Prompted, Reward, Tail
from stitchvm.core.branch import Branch, Interface
from stitchvm.core.layer import StitchingLayer
from stitchvm.core.reuse import BegunPasses
from stitchvm.core.value import StitchedValue

BACKBONE, REWARD = "sd3.5-medium", "clip-vit-l-14-336"
INTERFACE, SMALL_INTERFACE = Interface(4, 1), Interface(2, 1)
RESOLUTION = 512
"""Image pixels: latents ``[1, 16, 64, 64]``."""

GUIDANCE_SCALE = 4.5
STEPS = 100
"""Of a whole sampling run (paper, section 5), of which a benchmark takes a few."""

DEVIATION = 0.02
"""Of random weights."""


@attrs.frozen(eq=False)
class Networks:
    """What guidance runs through, and the shapes it runs at: ``noise [1, C, h, w]``, random embeddings of a prompt and
    of the empty one, and the reward's own of the prompt."""

    backbone: Backbone
    vae: AutoencoderKL
    reward: Reward
    value: StitchedValue
    noise: Tensor
    prompt: Condition
    null: Condition
    text: Condition

    @classmethod
    def build(cls, *, small: bool = False, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Self:
        """All networks in ``dtype``, frozen, the same at every call; ``small`` for the registry's twins at their own
        resolution."""
        draw = torch.Generator(device).manual_seed(0)
        backbone, vae, reward = _geometry(small)
        interface = SMALL_INTERFACE if small else INTERFACE
        prompt, null = (_like(backbone.example()[1], draw, dtype) for _ in range(2))
        width = backbone.feature_info()[interface.i].num_chs
        branch = _branch(width, reward, interface.j)
        for network in (backbone.net, vae, reward.net, branch):
            materialise(network, draw, dtype)
        backbone.companions.open_vae = lambda: vae
        value = StitchedValue(
            Head(backbone, interface.i), {REWARD: branch}, null, rewards={REWARD: reward}
        ).requires_grad_(False)
        side = (backbone.native_resolution if small else RESOLUTION) // backbone.latent_factor
        noise = core.seeded_noise([0], (backbone.latent_channels, side, side), device)
        text = torch.randn(1, reward.record.architecture["embed_dim"], generator=draw, device=device)
        unit = Condition({"text": nn.functional.normalize(text)})
        return cls(backbone, vae, reward, value, noise, prompt, null, unit)

    def problem(self, estimator: Estimator | None, *, reuse: bool = True) -> AlignProblem:
        """One particle of one prompt under classifier-free guidance; nothing of it is judged."""
        denoiser = Denoiser(self.backbone, self.prompt, self.null, GUIDANCE_SCALE)
        sigmas = self.backbone.sigmas(STEPS, (self.noise.shape[-2], self.noise.shape[-1])).to(self.noise.device)
        return AlignProblem(
            Prompted(denoiser, self.text), self.noise[None], sigmas, estimator, _unjudged,
            [torch.Generator().manual_seed(0)], begun=BegunPasses(reuse),
        )  # fmt: skip

    def checkpoint_gradients(self) -> None:
        """Have denoiser, decoder and reward keep a block's input alone and run it again on the way back."""
        self.backbone.gradient_checkpointing = self.reward.gradient_checkpointing = True
        self.vae.enable_gradient_checkpointing()


def networks_for(given: argparse.Namespace) -> Networks:
    """Those that a benchmark's options ask for, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Networks.build(small=given.small, dtype=getattr(torch, given.dtype), device=device)


def _unjudged(latents: Tensor, context: Prompted) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("a benchmark's latents are never finished.")


def _geometry(small: bool) -> tuple[Any, AutoencoderKL, Any]:
    """Backbone, autoencoder and reward on the meta device."""
    records: list[Any] = [core.registry().backbone(BACKBONE), core.registry().reward(REWARD)]
    if small:
        records = [attrs.evolve(record, architecture=record.twin) for record in records]
    with torch.device("meta"):
        vae = AutoencoderKL(**records[0].architecture["vae"])
    backbone, reward = (core.build_geometry(record) for record in records)
    return backbone, vae, reward


def _branch(width: int, reward: Reward, j: int) -> Branch:
    """A stitching layer from ``width`` channels and the reward's tail from block ``j``, on the meta device."""
    channels = reward.feature_info()[j - 1].num_chs
    with torch.device("meta"):
        tail = Tail(reward, j, torch.zeros(reward.prefix_count, channels))
        return Branch(StitchingLayer(width, channels, reward.grid_size), tail)


def materialise(network: nn.Module, draw: torch.Generator, dtype: torch.dtype) -> None:
    """Fill a network of the meta device with random weights on the device of ``draw``, frozen and in eval mode.

    Normal of deviation 0.02, but 1 for the scales of norms: activations then stay in a trained network's range, clear
    of subnormal numbers, which some processors are slow at.
    """
    nn.Module.to(network, dtype)  # diffusers' own warns of layers kept in float32, of which there are none here
    network.to_empty(device=draw.device).requires_grad_(False).eval()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(std=DEVIATION, generator=draw)


def _like(condition: Condition, draw: torch.Generator, dtype: torch.dtype) -> Condition:
    """Standard normal numbers in the shapes of ``condition``."""
    return Condition({
        name: torch.randn(tensor.shape, generator=draw, device=draw.device).to(dtype)
        for name, tensor in condition.tensors.items()
    })  # fmt: skip


class PeakMemory:
    """``with PeakMemory(device) as memory: ...``: the most ``memory.bytes`` that were held inside, above what was held
    before; on CUDA what torch allocates, else of the process (Linux's own count, reset at the start)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            # ru_maxrss would begin with what the parent held when it started this process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
        self.bytes = max(most - self._before, 0)  # Linux counts a thread's last pages late


def _resident(line: str) -> int:
    """Resident bytes of this process: now (``VmRSS``) or at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(f"{line}:"))
