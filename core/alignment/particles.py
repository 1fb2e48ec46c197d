"""Particles: several candidate samples a prompt, with weights and ancestry, and what every particle method shares.

Networks see flat batches ``[P * K, ...]`` of ``P`` prompts, the ``K`` rows of one prompt in a row; everything else is
``[P, N, ...]``. All randomness comes from seeds of (run, prompt, particle), so a result depends neither on the batch
size nor on the other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ..sampling import seeded_noise
from ..seeds import stream_seed


def initial_noise(seed: int, prompts: Sequence[int], particles: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal ``[P, N, *shape]``: particle ``n`` of prompt ``p`` starts from the same noise under every method.

    ``prompts`` are positions in the whole list of prompts. More particles leave the first ones unchanged.
    """
    seeds = [stream_seed(seed, prompt, particle) for prompt in prompts for particle in range(particles)]
    return seeded_noise(seeds, shape, "cpu").unflatten(0, (len(prompts), particles))


def step_generators(seed: int, prompts: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a prompt for all that happens after the initial noise: transitions, proposals, resampling."""
    # Three numbers: no stream of one or two, such as an initial noise, is ever the same.
    return [torch.Generator().manual_seed(stream_seed(seed, prompt, 0, 0)) for prompt in prompts]


@attrs.frozen(eq=False)
class Resampling:
    """One look at the particles: their ``values [P, N]`` at ``sigma`` before step ``step`` is taken, NaN where the
    estimator gave no number and the particle was dropped.

    ``ess [P]`` with the new weights; ``resampled [P]`` says which prompts were resampled, ``ancestors [P, N]`` from
    whom (the identity where not).
    """

    step: int
    sigma: float
    values: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor


@attrs.frozen(eq=False)
class Particles:
    """What a method returns: all particles, never only the winner.

    ``latents [P, N, C, h, w]`` clean; ``log_weights [P, N]`` normalised (of the distribution the method samples, such
    as ``p(z0) exp(strength r(z0))``); ``rewards [P, N]`` clean rewards, NaN where there was no number;
    ``ancestry [P, N]`` the initial particle each descends from; ``images [P, N, 3, H, W]`` in [0, 1] where kept;
    ``history`` of FK-like methods. All on the CPU.
    """

    latents: Tensor
    log_weights: Tensor
    rewards: Tensor
    ancestry: Tensor
    images: Tensor | None = None
    history: tuple[Resampling, ...] = ()

    @property
    def best(self) -> Tensor:
        """``[P]``: the particle of highest clean reward."""
        return self.rewards.nan_to_num(nan=-torch.inf).argmax(1)

    @property
    def dropped(self) -> Tensor:
        """``[P]``: how often a value or a reward was not a number."""
        looks = [look.values.isnan().sum(1) for look in self.history]
        return torch.stack([self.rewards.isnan().sum(1), *looks]).sum(0)

    @property
    def weights(self) -> Tensor:
        """``[P, N]``, summing to 1 over the particles."""
        return self.log_weights.exp()
