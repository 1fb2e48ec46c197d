"""Particles: several candidate samples a prompt, with weights and ancestry, and what every particle method shares.

Networks see flat batches ``[P * K, ...]`` of ``P`` prompts, the ``K`` rows of one prompt in a row; everything else is
``[P, N, ...]``. All randomness comes from seeds of (run, prompt, particle), so a result depends neither on the batch
size nor on the other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

import attrs
import torch
from torch import Tensor

from .backbone import Backbone
from .errors import ConfigError, NonFiniteError
from .estimators import Estimator, Prompted
from .kernels import Transition
from .paths import Prediction, as_sigma
from .sampling import sample, seeded_noise
from .seeds import stream_seed

Resampler = Callable[[Tensor, torch.Generator], Tensor]
"""``resampler(weights [N], generator) -> ancestors [N]``, with expected counts ``N weights``."""


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


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """``1 / sum w^2`` of the normalised weights: ``[..., N]`` to ``[...]``, between 1 and N."""
    return 1 / log_weights.double().softmax(-1).square().sum(-1)


def multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Independent draws with replacement, as published with FK steering."""
    return _invert(weights, torch.rand(len(weights), generator=generator, dtype=torch.float64))


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform draw on a comb of N teeth: a count differs from ``N w`` by less than one."""
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    return _invert(weights, (torch.arange(len(weights), dtype=torch.float64) + offset) / len(weights))


RESAMPLERS: dict[str, Resampler] = {"multinomial": multinomial, "systematic": systematic}


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """The inverse of the weights' distribution function at ``points`` in [0, 1)."""
    cumulative = weights.double().cpu().cumsum(0)
    # right=True steps over particles of weight zero, whose interval is empty.
    return torch.searchsorted(cumulative / cumulative[-1], points, right=True).clamp_max(len(weights) - 1)


@attrs.frozen(eq=False)
class Resampling:
    """One look at the particles: their ``values [P, N]`` at ``sigma`` before step ``step`` is taken.

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
    as ``p(z0) exp(strength r(z0))``); ``rewards [P, N]`` clean rewards; ``ancestry [P, N]`` the initial particle each
    descends from; ``images [P, N, 3, H, W]`` in [0, 1] where kept; ``history`` of FK-like methods. All on the CPU.
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
        return self.rewards.argmax(1)

    @property
    def weights(self) -> Tensor:
        """``[P, N]``, summing to 1 over the particles."""
        return self.log_weights.exp()


Judge = Callable[[Tensor, Prompted], tuple[Tensor, Tensor]]
"""``judge(clean latents [B, C, h, w], context) -> (rewards [B], images [B, 3, H, W])``."""


def _ignore(share: float) -> None:
    """No progress bar."""


@attrs.frozen(eq=False)
class AlignProblem:
    """What a method is given: ``P`` prompts with ``N`` particles each.

    ``context`` has one sample a prompt; ``noise [P, N, C, h, w]``; ``sigmas [steps + 1]`` falls to 0; ``judge`` gives
    the clean reward that the final selection uses; ``generators`` (one a prompt) are the only other source of
    randomness. ``batch`` bounds the samples of one network pass (guidance runs each twice). ``progress`` is told the
    share of the work just done.
    """

    context: Prompted
    noise: Tensor
    sigmas: Tensor
    estimator: Estimator | None
    judge: Judge
    generators: Sequence[torch.Generator]
    batch: int = 64
    progress: Callable[[float], object] = _ignore

    @property
    def backbone(self) -> Backbone:
        return self.context.denoiser.backbone

    @property
    def prompts(self) -> int:
        return self.noise.shape[0]

    @property
    def particles(self) -> int:
        return self.noise.shape[1]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def chunks(self, rows: int) -> Iterator[tuple[slice, Prompted]]:
        """Slices of a flat batch of ``rows`` (a multiple of P), at most ``batch`` long, with their context."""
        owners = torch.arange(self.prompts).repeat_interleave(rows // self.prompts)
        for start in range(0, rows, self.batch):
            part = slice(start, min(start + self.batch, rows))
            yield part, self.context.index(owners[part])

    def denoise(self, latents: Tensor, sigma: Tensor) -> Prediction:
        """The (guided) prediction for flat latents, in chunks."""
        parts = [context.denoiser(latents[part], sigma) for part, context in self.chunks(len(latents))]
        z0, eps = (torch.cat([getattr(part, name) for part in parts]) for name in ("z0", "eps"))
        return Prediction(parts[0].path, latents, as_sigma(sigma, latents), z0, eps)

    def estimate(self, latents: Tensor, sigma: Tensor, prediction: Prediction | None = None) -> Tensor:
        """``[rows]`` values of flat latents, in chunks; ``prediction`` saves a Tweedie-like estimator its denoiser
        pass.

        Raises :class:`ConfigError` without an estimator and :class:`NonFiniteError` for a value that is not finite.
        """
        if self.estimator is None:
            raise ConfigError("this method steers by a value; pass value=, a stitched value model or 'tweedie'.")
        level = as_sigma(sigma, latents)
        values = []
        for part, context in self.chunks(len(latents)):
            known = None if prediction is None else prediction.index(part)
            values.append(self.estimator(latents[part], level[part], context, known))
        joined = torch.cat(values).float()
        if not bool(joined.isfinite().all()):
            raise NonFiniteError(f"{type(self.estimator).__name__} gave a value that is not finite at sigma {sigma:g}.")
        return joined

    def draw(self, transition: Transition) -> Tensor:
        """A sample of each row's transition; each prompt's noise comes from its own generator, none for an ODE step."""
        if not bool((transition.std > 0).any()):
            return transition.mean
        shape = (len(transition.mean) // self.prompts, *transition.mean.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in self.generators])
        return transition.sample(noise.to(transition.mean))

    def sample(self) -> Tensor:
        """Clean latents ``[P, N, C, h, w]`` by the plain ODE from every particle's noise."""
        flat = self.noise.flatten(0, 1)
        clean = []
        for part, context in self.chunks(len(flat)):
            share = (part.stop - part.start) / (len(flat) * self.steps)
            tick = _ticker(self.progress, share)
            clean.append(sample(context.denoiser, flat[part], self.sigmas, callback=tick))
        return torch.cat(clean).view_as(self.noise)

    def finish(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Clean rewards ``[P, N]`` and images ``[P, N, 3, H, W]`` of clean latents ``[P, N, C, h, w]``, on the CPU."""
        flat = latents.flatten(0, 1)
        if not bool(flat.isfinite().all()):
            raise NonFiniteError("the final latents are not finite; check sigmas, guidance and strength.")
        judged = [self.judge(flat[part], context) for part, context in self.chunks(len(flat))]
        rewards, images = (torch.cat([pair[k].float().cpu() for pair in judged]) for k in (0, 1))
        if not bool(rewards.isfinite().all()):
            raise NonFiniteError("the reward of a finished image is not finite.")
        return rewards.view(latents.shape[:2]), images.unflatten(0, latents.shape[:2])

    def unweighted(self, latents: Tensor) -> Particles:
        """Independent samples as particles: equal weights, each its own ancestor."""
        rewards, images = self.finish(latents)
        equal = torch.zeros_like(rewards).log_softmax(1)
        ancestry = torch.arange(self.particles).expand(self.prompts, -1).clone()
        return Particles(latents.cpu(), equal, rewards, ancestry, images)


def _ticker(progress: Callable[[float], object], share: float) -> Callable[[int, Tensor, Prediction], None]:
    def tick(step: int, latents: Tensor, prediction: Prediction) -> None:
        progress(share)

    return tick


class Aligner(Protocol):
    """A method: an attrs class whose fields are its settings. It takes an estimator and never asks which."""

    default_particles: ClassVar[int]

    def run(self, problem: AlignProblem) -> Particles:
        """Steer every prompt's particles to clean latents."""
