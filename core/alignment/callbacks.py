"""Steering inside an unmodified pipeline call: objects for the ``callback_on_step_end`` of diffusers' pipelines.

At the end of step ``k - 1`` a pipeline hands out the latents that step ``k`` begins with, at the noise level ``sigma``
of that step. A callback reads them with a value model and hands back others at the same level.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from ..attention import gradient_in
from ..backbone import Backbone
from ..conditions import Condition
from ..errors import ConfigError, NonFiniteError
from ..latent_space import pipeline_misfit
from ..paths import Prediction, as_sigma, spread
from ..validators import number_within, one_of, whole_from
from ..value import StitchedValue
from .given import reward_condition
from .particles import Resampling, step_generators
from .resampling import RESAMPLERS, draw_ancestors
from .scheduler_steps import step_of
from .windows import Window, steps_within


def _stitched(instance: object, attribute: object, value: Any) -> None:
    if not isinstance(getattr(getattr(value, "head", None), "part", None), Backbone):
        raise ConfigError(
            f"value is a {type(value).__name__}; a callback takes a StitchedValue (StitchedValue.from_pretrained). "
            "Other estimators steer with core.steer."
        )


def _prompts(given: str | Sequence[str]) -> tuple[str, ...]:
    prompts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompt is {given!r}; give the prompt, or the list of them, that the pipeline is given.")
    return prompts


def _fractions(instance: object, attribute: object, window: Window) -> None:
    steps_within(torch.linspace(1, 0, 2), window)


@attrs.frozen(eq=False)
class Guided:
    """One guided step: the ``values [B]`` of the latents that step ``step`` would have begun with at ``sigma``, NaN
    where not finite."""

    step: int
    sigma: float
    values: Tensor


@attrs.frozen(eq=False)
class _Step:
    """A step just taken: ``latents [B, C, h, w]`` float32 on the value's device, which went from ``sigma_before`` to
    ``sigma`` and begin step ``number``; ``prompts [B]`` are the numbers of theirs."""

    number: int
    latents: Tensor
    sigma_before: float
    sigma: float
    prompts: Tensor

    def parts(self, batch: int) -> Iterator[slice]:
        """The rows, at most ``batch`` at a time."""
        for start in range(0, len(self.latents), batch):
            yield slice(start, start + batch)


@attrs.define(eq=False)
class StepCallback(ABC):
    """What both callbacks share: which steps they act in, and what stands between a pipeline's latents and a value's.

    ``prompt`` as the pipeline is called with it; so are ``height`` and ``width``, which a pipeline that packs its
    latents (FLUX) does not tell. ``batch`` bounds the latents of one pass of the value and changes nothing else. The
    last step's clean latents are left alone: a value is for noisy ones.
    """

    value: StitchedValue = attrs.field(validator=_stitched)
    prompts: tuple[str, ...] = attrs.field(converter=_prompts, alias="prompt")
    window: Window = attrs.field(default=(0.2, 0.8), kw_only=True, validator=_fractions)
    height: int | None = attrs.field(default=None, kw_only=True)
    width: int | None = attrs.field(default=None, kw_only=True)
    batch: int = attrs.field(default=64, kw_only=True, validator=whole_from(1))
    history: list[Any] = attrs.field(factory=list, init=False)
    _rewarded: Condition | None = attrs.field(default=None, init=False)
    _prompted: Condition | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ConfigError("give both height and width, as the pipeline is called with them, or none.")

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors that the pipeline goes on with.

        Raises :class:`ConfigError` for a pipeline that does not hand out its latents, or holds others than the value
        reads (of an autoencoder with another scale, :func:`~stitchvm.core.latent_space.pipeline_misfit`), and
        ``NonFiniteError`` for values that are not finite.
        """
        if "latents" not in tensors:
            raise ConfigError(
                f"{type(self).__name__} changes the latents; call the pipeline with "
                "callback_on_step_end_tensor_inputs=['latents']."
            )
        # A value's gradient needs tensors that autograd may record, whatever mode the pipeline was called in.
        with torch.inference_mode(False), torch.no_grad():
            return {**tensors, "latents": self._after(pipeline, step, timestep, tensors["latents"].clone())}

    def _after(self, pipeline: Any, step: int, timestep: Any, latents: Tensor) -> Tensor:
        if len(latents) % len(self.prompts):
            raise ConfigError(
                f"{len(latents)} latents cannot belong to {len(self.prompts)} prompts in equal parts; give the prompts "
                "that the pipeline is called with."
            )
        backbone = self._backbone
        sigmas = backbone.pipeline_sigmas(pipeline)
        if step == 0:
            self.restart(pipeline)
        timesteps = pipeline.scheduler.timesteps
        if step >= len(timesteps) or timesteps[step] != timestep:
            raise ConfigError(
                f"step {step} is at timestep {float(timestep):g}, which is not what the scheduler has there; callbacks "
                "read the levels of a text-to-image call, which takes every timestep in turn."
            )
        number, sigma = step + 1, float(sigmas[step + 1])
        if sigma == 0 or number not in self.steps(sigmas):
            return latents
        # A step that ends where it begins is the last one taken again (PNDM).
        before = float(sigmas[step - 1 if sigmas[step] == sigmas[step + 1] and step else step])
        own = backbone.from_pipeline_latents(pipeline, latents.float(), sigma, self._size).to(self.value.device)
        prompts = torch.arange(len(self.prompts)).repeat_interleave(len(latents) // len(self.prompts))
        return self.change(pipeline, _Step(number, own, before, sigma, prompts), latents)

    def steps(self, sigmas: Tensor) -> Sequence[int]:
        """The steps whose first latents are changed."""
        return steps_within(sigmas, self.window)

    def restart(self, pipeline: Any) -> None:
        """Forget the call before this one."""
        if reason := pipeline_misfit(self._backbone, pipeline):
            raise ConfigError(
                f"the value of {', '.join(self.value.names)} cannot read this {type(pipeline).__name__}'s latents: "
                f"{reason}. Stitch one to a model with the pipeline's autoencoder."
            )
        self.history, self._prompted, self._rewarded = [], None, None

    @abstractmethod
    def change(self, pipeline: Any, step: _Step, latents: Tensor) -> Tensor:
        """What to go on with in the place of ``latents``, which are the pipeline's form of ``step.latents``."""

    def read(self, pipeline: Any, step: _Step, part: slice, latents: Tensor) -> Tensor:
        """The values of ``latents``, the rows ``part`` of the step's."""
        if self._rewarded is None:
            self._rewarded = reward_condition(self.value.objective(), self.prompts)
        if self.value.prompted and self._prompted is None:
            self._prompted = self._encoded(pipeline)
        rows, device = step.prompts[part], latents.device
        prompt = None if self._prompted is None else self._prompted.index(rows).to(device)
        return self.value(latents, step.sigma, self._rewarded.index(rows).to(device), prompt=prompt)

    def _encoded(self, pipeline: Any) -> Condition:
        """The prompts by the pipeline's text encoders or, where those lie where only its own calls fetch them from, by
        those of the value's own backbone."""
        own, prompts = self._backbone, list(self.prompts)
        parts = [part for part in vars(pipeline).values() if isinstance(part, nn.Module)]
        if not any(hasattr(part, "_hf_hook") for part in parts):
            # The value's own family: pipelines with more parts (a ControlNet) are of classes that no family names.
            found: Condition = type(own).from_pipeline(pipeline).encode_prompts(prompts)  # type: ignore[attr-defined]
            return found
        theirs = {id(parameter) for part in parts for parameter in part.parameters()}
        if any(id(parameter) in theirs for parameter in self.value.head.parameters()):
            raise ConfigError(
                f"the value's head reads the prompt, but the text encoders of this {type(pipeline).__name__} are "
                "offloaded, and the value has no others where it shares the pipeline's weights. Load it with a "
                "backbone of its own: StitchedValue.from_pretrained(folder), without backbone=."
            )
        return own.encode_prompts(prompts)

    @property
    def _backbone(self) -> Backbone:
        part = self.value.head.part
        assert isinstance(part, Backbone)
        return part

    @property
    def _size(self) -> tuple[int, int] | None:
        return None if self.height is None or self.width is None else (self.height, self.width)


@attrs.define(eq=False)
class GuidanceCallback(StepCallback):
    """Gradient guidance: each step lands where it would with the score ``score + strength grad V`` (paper, section 5),
    the gradient being that of the latents the step led to.

    ``GuidanceCallback(value, prompt, strength=1.0)``. ``window``: fractions of the steps. ``normalisation``: ``raw``,
    or ``unit-rms``, every latent's gradient at a root mean square of 1. ``eta`` as the pipeline is called with it,
    which a callback is not told (DDIM). A step from ``sigma`` to ``sigma'`` that adds noise of deviation ``std`` is
    moved by ``strength (alpha' sigma^2 / alpha - sigma sqrt(sigma'^2 - std^2)) grad V`` (DDIM, eq. 12, for any path),
    not at all where ``alpha`` is 0; see :func:`step_of`. ``history`` holds the values of the last call as
    :class:`Guided`, before they were moved. A latent whose value or gradient is not finite is left unguided in that
    step, with a warning.

    In a call it also raises what :func:`step_of` does, and ``NonFiniteError`` where no image of a prompt has both.
    """

    strength: float = attrs.field(default=1.0, kw_only=True, validator=number_within(-math.inf))
    normalisation: Literal["raw", "unit-rms"] = attrs.field(
        default="raw", kw_only=True, validator=one_of(("raw", "unit-rms"))
    )
    eta: float = attrs.field(default=0.0, kw_only=True, validator=number_within(0, 1))

    def restart(self, pipeline: Any) -> None:
        super().restart(pipeline)
        step_of(pipeline.scheduler, self.eta)  # a mistake costs no step

    def change(self, pipeline: Any, step: _Step, latents: Tensor) -> Tensor:
        found = [self._differentiate(pipeline, step, part) for part in step.parts(self.batch)]
        values, gradient = (torch.cat(each) for each in zip(*found, strict=True))
        usable = values.isfinite() & gradient.flatten(1).isfinite().all(1)
        self._check_usable(usable.cpu(), step)
        gradient = gradient.masked_fill(~usable[:, None, None, None], 0)
        if self.normalisation == "unit-rms":
            size = gradient.square().mean((1, 2, 3)).sqrt()
            gradient = gradient / spread(size.clamp_min(torch.finfo(size.dtype).tiny), gradient)
        values = values.masked_fill(~values.isfinite(), torch.nan)
        self.history.append(Guided(step.number, step.sigma, values.cpu()))
        still = torch.zeros_like(gradient)
        level, lower = (as_sigma(sigma, still) for sigma in (step.sigma_before, step.sigma))
        # Guidance and steps are linear: what they make of a prediction of zero is what they add to any.
        moved = Prediction(self._backbone.path, still, level, still, still).guided(self.strength * gradient)
        mean = step_of(pipeline.scheduler, self.eta)(moved, lower).mean
        shift = self._backbone.to_pipeline_latents(pipeline, mean, step.sigma)
        return (latents.float() + shift.to(latents.device)).to(latents.dtype)

    def _differentiate(self, pipeline: Any, step: _Step, part: slice) -> tuple[Tensor, Tensor]:
        """Values ``[b]`` and their gradients ``[b, C, h, w]`` of some of a step's latents."""
        z = step.latents[part].requires_grad_()
        with torch.enable_grad():
            values = self.read(pipeline, step, part, z)
            gradient = gradient_in(z, values, self.value.dtype)
        return values.detach(), gradient

    def _check_usable(self, usable: Tensor, step: _Step) -> None:
        """An error where no latent of a prompt is ``usable [B]``, a warning where some are not."""
        none = ~usable.view(len(self.prompts), -1).any(1)
        broken = int((~step.latents.flatten(1).isfinite().all(1)).sum())
        latents = f" ({broken} of the latents are not finite themselves: their images are lost)" if broken else ""
        if bool(none.any()):
            raise NonFiniteError(
                f"no image of prompt {self.prompts[int(none.nonzero()[0])]!r} has a value with a finite gradient at "
                f"sigma {step.sigma:g}{latents}; check the latents and the precision, and use a lower strength."
            )
        if lost := int((~usable).sum()):
            warnings.warn(
                f"{lost} of {len(usable)} latents have no value with a finite gradient at sigma {step.sigma:g}{latents}"
                "; they are not guided in this step.", RuntimeWarning, stacklevel=2
            )  # fmt: skip


@attrs.define(eq=False)
class ResamplingCallback(StepCallback):
    """Feynman-Kac resampling of the images of one prompt: ``num_images_per_prompt`` of them in a row are particles.

    ``ResamplingCallback(value, prompt, strength=10.0)``. Every ``interval`` steps of ``window`` the weights grow by
    ``exp(strength (V_k - V_{k-1}))`` with ``V_0 = 0``; where the effective sample size is at most ``ess_threshold`` of
    the particles (1 always, 0 never) they are drawn anew by ``resampler`` (:data:`RESAMPLERS`), otherwise carried on.
    ``particles`` is checked against the call when given. ``seed`` decides the draws, anew in every call. An image whose
    value is not finite is dropped, with a warning: its weight is 0 until resampling replaces it.

    Copies part only where the scheduler adds noise (``stochastic_sampling=True`` for SD 3 and FLUX, ``eta=1.0`` in the
    call for DDIM, ``EulerAncestralDiscreteScheduler``); otherwise they end as the same image. ``history`` holds the
    :class:`Resampling` of the last call and ``log_weights [P, N]`` what was carried to its end.

    In a call it also raises ``NonFiniteError`` where all images of a prompt are dropped.
    """

    strength: float = attrs.field(default=10.0, kw_only=True, validator=number_within(0))
    interval: int = attrs.field(default=4, kw_only=True, validator=whole_from(1))
    resampler: str = attrs.field(default="multinomial", kw_only=True, validator=one_of(RESAMPLERS))
    ess_threshold: float = attrs.field(default=0.5, kw_only=True, validator=number_within(0, 1))
    particles: int | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(whole_from(1)))
    seed: int = attrs.field(default=0, kw_only=True, validator=whole_from(0))
    log_weights: Tensor | None = attrs.field(default=None, init=False)
    _last: Tensor | None = attrs.field(default=None, init=False)
    _generators: list[torch.Generator] = attrs.field(factory=list, init=False)

    def restart(self, pipeline: Any) -> None:
        super().restart(pipeline)
        self.log_weights = self._last = None
        self._generators = step_generators(self.seed, range(len(self.prompts)))

    def steps(self, sigmas: Tensor) -> Sequence[int]:
        return steps_within(sigmas, self.window)[:: self.interval]

    def change(self, pipeline: Any, step: _Step, latents: Tensor) -> Tensor:
        each = len(latents) // len(self.prompts)
        if self.particles not in (None, each):
            raise ConfigError(
                f"there are {each} latents a prompt, but particles is {self.particles}; call the pipeline with "
                "num_images_per_prompt=particles."
            )
        read = [self.read(pipeline, step, part, step.latents[part]) for part in step.parts(self.batch)]
        ancestors = self._resample(torch.cat(read).double().cpu().view(-1, each), step)
        rows = (ancestors + each * torch.arange(len(ancestors))[:, None]).flatten()
        if bool((rows == torch.arange(len(rows))).all()):
            return latents
        _follow(pipeline.scheduler, latents.shape, rows)
        return latents[rows.to(latents.device)]

    def _resample(self, values: Tensor, step: _Step) -> Tensor:
        """Ancestors ``[P, N]``, the identity where weights are carried on, from values ``[P, N]``."""
        lost = ~values.isfinite()
        values = values.masked_fill(lost, torch.nan)
        past = torch.zeros_like(values) if self.log_weights is None else self.log_weights
        change = self.strength * (values if self._last is None else values - self._last)
        weights = past + change.nan_to_num(nan=-torch.inf)
        dead = weights.isneginf().all(1)
        if bool(dead.any()):
            prompt = self.prompts[int(dead.nonzero()[0])]
            raise NonFiniteError(
                f"no image of prompt {prompt!r} has a value that is finite up to sigma {step.sigma:g}; "
                "check the latents and the precision."
            )
        if bool(lost.any()):
            warnings.warn(
                f"{int(lost.sum())} of {lost.numel()} values are not finite at sigma {step.sigma:g}; these particles "
                "are dropped.", RuntimeWarning, stacklevel=2
            )  # fmt: skip
        size, chosen, ancestors = draw_ancestors(weights, self.resampler, self.ess_threshold, self._generators)
        self.history.append(Resampling(step.number, step.sigma, values.float(), size.float(), chosen, ancestors))
        self.log_weights = weights.masked_fill(chosen[:, None], 0)
        self._last = values.gather(1, ancestors)
        return ancestors


def _follow(scheduler: Any, shape: torch.Size, rows: Tensor) -> None:
    """Have what a multistep scheduler remembers of every latent (PNDM's ``ets``, DPM-Solver's ``model_outputs``)
    follow the resampling."""

    def moved(entry: Any) -> Any:
        if isinstance(entry, list):
            return [moved(each) for each in entry]
        alike = isinstance(entry, Tensor) and entry.shape == shape
        return entry[rows.to(entry.device)] if alike else entry

    for name, entry in list(vars(scheduler).items()):
        if isinstance(entry, list | Tensor):
            setattr(scheduler, name, moved(entry))
