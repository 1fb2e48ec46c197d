"""The denoiser as samplers see it: classifier-free guidance in one place, and the plain sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import attrs
import torch
from torch import Tensor

from .backbone import Backbone
from .conditions import Condition
from .errors import ConfigError, NonFiniteError
from .kernels import Kernel, Ode
from .paths import Prediction, as_sigma
from .records import name_of
from .reuse import BegunPass
from .validators import checked_number


@attrs.frozen(eq=False)
class Denoiser:
    """A backbone under a prompt: ``guided = uncond + guidance_scale (cond - uncond)`` on the network's output.

    ``condition`` holds one sample a latent. A ``guidance_scale`` of 1 runs the conditional pass alone; otherwise both
    branches are one batch, or two one after the other when ``split``.
    """

    backbone: Backbone
    condition: Condition
    null: Condition
    guidance_scale: float = 1.0
    split: bool = False

    def __call__(self, latents: Tensor, sigma: float | Tensor, begun: BegunPass | None = None) -> Prediction:
        """The (guided) prediction for latents ``[B, C, h, w]`` at ``sigma``; a pass that has ``begun`` at them is
        finished, not run again."""
        level, batch = as_sigma(sigma, latents), len(latents)
        if self.guidance_scale == 1:
            return self.backbone.denoise(latents, level, self.condition, begun)
        branches = (self.null.expand(batch), self.condition.expand(batch))
        if self.split:
            without, prompted = (self.backbone.denoise(latents, level, branch, begun) for branch in branches)
        else:
            without, prompted = self.backbone.denoise_under(branches, latents, level, begun)
        z0, eps = (
            getattr(without, name) + self.guidance_scale * (getattr(prompted, name) - getattr(without, name))
            for name in ("z0", "eps")
        )
        contrast = self.guidance_scale * (prompted.eps - without.eps)
        # The level is the one that the backbone read, which may be its largest one for a higher one asked.
        return attrs.evolve(prompted, latents=latents, z0=z0, eps=eps, contrast=contrast)

    def index(self, rows: Tensor | slice) -> Denoiser:
        """The denoiser of the chosen samples."""
        return attrs.evolve(self, condition=self.condition.index(rows))

    def repeat(self, times: int) -> Denoiser:
        """The denoiser of ``times`` particles a prompt, particles of one prompt in a row."""
        return attrs.evolve(self, condition=self.condition.repeat(times))


def chosen_guidance(backbone: Backbone, scale: float | None) -> float:
    """The scale of classifier-free guidance: where none is asked for 3, or 1 for a network distilled to need none.

    It is never the guidance that a distilled network reads beside its time (FLUX), whatever the scale is called in its
    pipeline: :meth:`Backbone.with_embedded_guidance` sets that, and 1 leaves it as it is. Raises :class:`ConfigError`
    for a scale that is no finite number from 0 on, and for any but 1 where the network was distilled.
    """
    distilled = backbone.guided_passes == 1
    if scale is None:
        return 1.0 if distilled else 3.0
    scale = checked_number("guidance_scale", scale, 0)
    if distilled and scale != 1:
        instead = "" if backbone.guidance is None else "; what the network itself reads is embedded_guidance"
        raise ConfigError(
            f"guidance_scale is {scale:g}, but {name_of(backbone)} was distilled to need no classifier-free guidance. "
            f"Leave it out, or give 1{instead}."
        )
    return scale


def guided(backbone: Backbone, scale: float | None, embedded: float | None) -> tuple[Backbone, float]:
    """What samples are drawn with: the backbone at the ``embedded`` guidance (its own when None), and the scale of
    classifier-free guidance, as :func:`chosen_guidance` has it. Raises :class:`ConfigError` for either."""
    network = backbone if embedded is None else backbone.with_embedded_guidance(embedded)
    return network, chosen_guidance(network, scale)


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Standard normal ``[len(seeds), *shape]``, row by row from its own seed: independent of batching and device."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


Callback = Callable[[int, Tensor, Prediction], None]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    kernel: Kernel | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Clean latents from ``noise [B, C, h, w]`` along ``sigmas [steps + 1]`` (falling, ending in 0).

    ``callback(step, latents, prediction)`` sees every step before it is taken. ``generator`` (on the CPU) is needed by
    a kernel with noise. Raises :class:`NonFiniteError` when the latents stop being finite.
    """
    kernel = kernel or Ode()
    latents = noise
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        prediction = denoiser(latents, sigma)
        if callback is not None:
            callback(step, latents, prediction)
        transition = kernel(prediction, as_sigma(sigma_next, latents))
        fresh = torch.randn(latents.shape, generator=generator) if bool((transition.std > 0).any()) else None
        latents = transition.mean if fresh is None else transition.sample(fresh.to(latents))
    if not bool(latents.isfinite().all()):
        raise NonFiniteError(
            f"sampling left the finite range after {len(sigmas) - 1} steps; check sigmas and guidance."
        )
    return latents
