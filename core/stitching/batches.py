"""What each step of stage 2 is trained on: examples, noise levels and noise, all drawn from ``(seed, step)``."""

from __future__ import annotations

from typing import Self

import attrs
import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import ConfigError
from ..seeds import stream_seed
from .examples import PROMPT, STATE_SIGMAS, STATES, Examples
from .finetune_settings import FinetuneSettings

GROUP = "group"
"""The column that numbers the groups of a batch: seeds of one prompt at one noise level, -1 for everything else."""


def draw_sigma(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """``[count]`` noise levels in (0, 1)."""
    return (
        torch.rand(count, generator=generator)
        if kind == "uniform"
        else torch.randn(count, generator=generator).sigmoid()
    )


def share_of(group: Tensor, process: int, processes: int) -> Tensor:
    """The rows that one of several processes takes of a batch whose groups are ``group [B]`` (-1: in none).

    Rows are dealt out in turn, those of one group together: they are compared with each other. Groups lie side by side.
    """
    first = (group < 0) | (group != group.roll(1))
    first[0] = True
    return ((first.cumsum(0) - 1) % processes == process).nonzero()[:, 0]


@attrs.frozen(eq=False)
class Batches:
    """Real images and the backbone's own samples, mixed as ``settings`` say.

    ``seeds[k]`` are the rows of ``samples`` that were drawn for one prompt (each row alone where nobody compares them).
    """

    backbone: Backbone
    images: Examples | None
    samples: Examples | None
    settings: FinetuneSettings
    seeds: list[Tensor]

    @classmethod
    def of(
        cls, backbone: Backbone, images: Examples | None, samples: Examples | None, settings: FinetuneSettings
    ) -> Self:
        """Raises :class:`ConfigError` for a mix that asks for a cache that is missing, or for more than one holds."""
        wanted = (("real images", images, 1 - settings.generated), ("generated samples", samples, settings.generated))
        for name, examples, part in wanted:
            if part > 0 and examples is None:
                raise ConfigError(f"the recipe takes {part:.0%} of its latents from {name}, but none were given.")
        seeds = [] if samples is None or not settings.generated else _seeds(samples, settings.seeds_per_prompt)
        return cls(backbone, images, samples, settings, seeds)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Step ``step``'s whole batch, on the CPU: ``noisy [B, C, h, w]``, ``sigma [B]``, ``group [B]``, ``prompt [B]``
        (the number of the prompt that the head reads, -1 for the null prompt) and the rewards' targets."""
        settings = self.settings
        generator = torch.Generator().manual_seed(stream_seed(settings.seed, step))
        groups = round(settings.generated * settings.batch_size / settings.seeds_per_prompt)
        real = settings.batch_size - groups * settings.seeds_per_prompt
        parts = []
        if real > 0 and self.images is not None:
            parts.append(self._real(real, generator))
        if groups:
            parts.append(self._generated(groups, generator))
        return join_sources(parts)

    def _real(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert self.images is not None
        rows = torch.randint(len(self.images), (count,), generator=generator)
        part = self.images.read(rows.tolist())
        sigma = draw_sigma(self.settings.noise, count, generator)
        none = torch.full((count,), -1.0)
        return self._noised(part, sigma, generator) | {GROUP: none, PROMPT: none}

    def _generated(self, groups: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert self.samples is not None
        each = self.settings.seeds_per_prompt
        prompts = torch.randint(len(self.seeds), (groups,), generator=generator).tolist()
        rows = [self.seeds[p][torch.randperm(len(self.seeds[p]), generator=generator)[:each]] for p in prompts]
        part = self.samples.read(torch.cat(rows).tolist())
        states, levels = part.pop(STATES, None), part.pop(STATE_SIGMAS, None)
        own = part.pop(PROMPT, torch.full((len(part["latents"]),), -1.0))
        sigma = draw_sigma(self.settings.noise, groups, generator).repeat_interleave(each)
        part = self._noised(part, sigma, generator)
        passed = round(self.settings.on_policy * groups)
        if passed:
            if states is None or levels is None:
                raise ConfigError("the recipe reads samples where the sampler passed, but their cache kept no states.")
            chosen = torch.randint(states.shape[1], (passed,), generator=generator).repeat_interleave(each)
            count = torch.arange(passed * each)
            part["noisy"][: passed * each] = states[count, chosen]
            part["sigma"][: passed * each] = levels[count, chosen]
        number = torch.arange(groups).repeat_interleave(each) if each > 1 else torch.full((groups,), -1)
        reads = (torch.rand(groups, generator=generator) < self.settings.prompted).repeat_interleave(each)
        return part | {GROUP: number.float(), PROMPT: torch.where(reads, own, -1.0)}

    def _noised(self, part: dict[str, Tensor], sigma: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The part with noisy latents in place of its clean ones."""
        clean = part.pop("latents")
        noise = torch.randn(clean.shape, generator=generator)
        return {"noisy": self.backbone.path.add_noise(clean, noise, sigma), "sigma": sigma, **part}


def _seeds(samples: Examples, each: int) -> list[Tensor]:
    """The rows of every prompt's samples; every row alone where one is enough."""
    if each == 1:
        return list(torch.arange(len(samples))[:, None])
    prompt = samples.column(PROMPT)
    fewest = 0 if prompt is None else int(prompt.unique(return_counts=True)[1].min())
    if prompt is None or fewest < each:
        raise ConfigError(
            f"the recipe compares {each} seeds of a prompt, but the samples hold {fewest} of some; "
            "draw more samples, or for fewer prompts."
        )
    order = prompt.argsort(stable=True)
    counts: list[int] = prompt.unique(return_counts=True)[1].tolist()
    return list(order.split(counts))


def join_sources(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of several sources as one batch. What a source lacks (a photograph was drawn for no prompt) is NaN, so
    that using it by mistake would show in the loss."""
    columns = {name: tensor for part in parts for name, tensor in part.items()}
    sizes = [len(part["noisy"]) for part in parts]
    return {
        name: torch.cat(
            [
                part[name] if name in part else like.new_full((size, *like.shape[1:]), torch.nan)
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for name, like in columns.items()
    }
