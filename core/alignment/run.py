"""Steering a backbone's samples: any method, any value estimator, many prompts, one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor
from tqdm.auto import tqdm

from ..backbone import Backbone
from ..conditions import Condition
from ..costs import CostMeter
from ..errors import ConfigError
from ..estimators import Estimator, Prompted, clean_reward
from ..joint import AnyReward, GivenReward
from ..loading import load_backbone
from ..lora import with_lora
from ..provenance import network_identity, sampled_identity
from ..reuse import BegunPasses
from ..sampling import Denoiser, guided
from ..structuring import plain, with_config_errors
from ..validators import whole_from
from .given import (
    Size,
    Value,
    checked_prompts,
    estimator_identity,
    latent_size,
    prompts_digest,
    resolve_method,
    resolve_value,
    reward_condition,
)
from .particles import initial_noise, step_generators
from .problem import Aligner, AlignProblem
from .result import AlignResult, PartStore


def align(
    method: str | Aligner,
    backbone: str | Backbone,
    value: Value,
    prompts: Sequence[str],
    *,
    particles: int | None = None,
    proposals: int | None = None,
    seed: int = 0,
    steps: int = 28,
    guidance_scale: float | None = None,
    embedded_guidance: float | None = None,
    negative_prompt: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    reward: GivenReward | None = None,
    lora: str | Path | None = None,
    batch: int = 64,
    reuse: bool = True,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> AlignResult:
    """Sample ``prompts`` with a method that seeks a high reward.

    ``method``: a registered name (``sample``, ``best-of-n``, ``fk-steering``, ``dps`` ..) with its own ``settings`` as
    further keywords, or a ready object. ``value``: what steers it, a stitched value model (or the folder of one),
    ``"tweedie"`` or ``"monte-carlo"`` (with ``reward``), any estimator, or None for a method that needs none. A value
    model of another backbone steers too where both have the same latents, by its own backbone's blocks.
    ``reward``: what picks each prompt's best particle, the value's own by default; the sum of several names, or of
    their weights by name (``{"hpsv2": 1, "clip-vit-l-14": 0.5}``).
    ``lora``: the folder of one that the backbone samples with (:func:`~stitchvm.core.train` writes such); a value
    model's head goes on reading the backbone without it. ``guidance_scale`` of classifier-free guidance: 3, or 1, which
    is none, for a distilled backbone, which takes no other; ``negative_prompt``: what it leads away from, the empty
    prompt when None. ``embedded_guidance``: the scale that a distilled backbone reads beside its time (FLUX), its own
    when None; a value model's head goes on reading the one that it was stitched at. ``particles`` a prompt and
    ``proposals`` a particle, where the method draws them (default: the method's). ``batch`` bounds the samples of one
    network pass and changes nothing else. ``reuse``: a denoising step finishes the pass that the value model's head has
    begun at the same latent, if any. ``resolution`` in pixels, one number or height and width; the backbone's own by
    default.

    Particle ``n`` of a prompt starts from the same noise under every method with the same ``seed``, so gains can be
    paired. With ``out`` every finished prompt is kept there, a rerun with the same settings continues, and the result
    is saved at the end.

    Raises ``UnknownNameError``, ``WeightsError`` for a LoRA of another network, :class:`ConfigError` for a setting that
    is unknown or out of range or that differs from those of the run to continue, and for a value model that cannot read
    the backbone's latents, ``ArtefactError`` for a folder without one, ``OutputError`` when ``out`` cannot be written,
    ``NonFiniteError`` when sampling diverges.
    """
    network, scale = guided(load_backbone(backbone), guidance_scale, embedded_guidance)
    estimator, judge = resolve_value(value, reward, network, seed)
    if lora is not None:
        network = with_lora(network, lora)
    drawn = {} if proposals is None else {"proposals": proposals}
    aligner = resolve_method(method, {**drawn, **settings})
    if not hasattr(aligner, "run"):
        raise ConfigError(f"{type(aligner).__name__} trains weights and steers nothing; use train.")
    job = _Job(
        name=method if isinstance(method, str) else type(method).__name__, method=aligner, backbone=network,
        estimator=estimator, reward=judge, prompts=checked_prompts(prompts),
        particles=aligner.default_particles if particles is None else particles, seed=seed, steps=steps,
        guidance_scale=scale, batch=batch,
        reuse=reuse, lora=None if lora is None else str(lora), negative_prompt=negative_prompt,
        resolution=network.native_resolution if resolution is None else resolution,
    )  # fmt: skip
    result = job.run(PartStore.open(out, job.settings()), progress)
    if out is not None:
        result.save(out)
    return result


def _divisible(job: _Job, attribute: attrs.Attribute[Size], resolution: Size) -> None:
    latent_size(job.backbone, resolution)


def _guiding(job: _Job, attribute: attrs.Attribute[str | None], negative_prompt: str | None) -> None:
    if negative_prompt is None:
        return
    if not isinstance(negative_prompt, str):
        raise ConfigError(f"negative_prompt is {negative_prompt!r}; give one text for all prompts.")
    if job.guidance_scale == 1:
        raise ConfigError(
            f"negative_prompt is {negative_prompt!r}, but only classifier-free guidance reads it, and there is none "
            "where guidance_scale is 1, as it is for a distilled network (FLUX); give another scale, or leave it out."
        )


@attrs.frozen(eq=False, kw_only=True, field_transformer=with_config_errors)
class _Job:
    """One call of :func:`align`, checked."""

    name: str
    method: Aligner
    backbone: Backbone
    estimator: Estimator | None
    reward: AnyReward
    prompts: tuple[str, ...]
    particles: int = attrs.field(validator=whole_from(1))
    seed: int = attrs.field(validator=whole_from(0))
    steps: int = attrs.field(validator=whole_from(1))
    guidance_scale: float
    resolution: Size = attrs.field(validator=_divisible)
    batch: int = attrs.field(validator=whole_from(1))
    reuse: bool = True
    lora: str | None = None
    negative_prompt: str | None = attrs.field(default=None, validator=_guiding)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, JSON-able: what a run to be continued must share."""
        settings = {
            "method": self.name, "method_settings": plain(self.method), "estimator": estimator_identity(self.estimator),
            "backbone": {
                **sampled_identity(self.backbone),
                **({} if self.lora is None else {"lora": self.lora}),
            },
            "reward": network_identity(self.reward),
            "particles": self.particles, "seed": self.seed, "steps": self.steps,
            "guidance_scale": float(self.guidance_scale), "reuse": self.reuse, "resolution": self.resolution,
            "prompts": prompts_digest(self.prompts),
            **({} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}),
        }  # fmt: skip
        # As it will be when read back: tuples become lists.
        return dict(json.loads(json.dumps(settings, default=repr)))

    def run(self, store: PartStore, progress: bool) -> AlignResult:
        """Every prompt that ``store`` does not hold yet, as many at a time as ``batch`` has room for."""
        missing = [number for number in range(len(self.prompts)) if number not in store]
        together = max(1, self.batch // self.particles)
        negative = self.negative_prompt
        null = self.backbone.null_condition() if negative is None else self.backbone.encode_prompts([negative])
        bar = tqdm(
            total=len(self.prompts), initial=len(self.prompts) - len(missing), desc=self.name, disable=not progress,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", mininterval=0.5,
        )  # fmt: skip
        with bar:
            for start in range(0, len(missing), together):
                numbers = missing[start : start + together]
                with CostMeter() as cost:
                    particles = self.method.run(self._problem(numbers, null, bar.update))
                store.add(numbers, particles, cost)
        return store.result(self.prompts)

    def _problem(self, numbers: list[int], null: Condition, advance: Callable[[float], object]) -> AlignProblem:
        device, prompts = self.backbone.device, [self.prompts[number] for number in numbers]
        height, width = latent_size(self.backbone, self.resolution)
        shape = (self.backbone.latent_channels, height, width)
        condition = self.backbone.encode_prompts(prompts).to(device)
        denoiser = Denoiser(self.backbone, condition, null.to(device), self.guidance_scale)
        context = Prompted(denoiser, reward_condition(self.reward, prompts).to(device))

        def judge(latents: Tensor, context: Prompted) -> tuple[Tensor, Tensor]:
            return clean_reward(latents, context, self.reward)

        return AlignProblem(
            context, initial_noise(self.seed, numbers, self.particles, shape).to(device),
            self.backbone.sigmas(self.steps, (height, width)).to(device), self.estimator, judge,
            step_generators(self.seed, numbers), self.batch, lambda share: advance(share * len(numbers)),
            BegunPasses(self.reuse),
        )  # fmt: skip
