"""Steering with a diffusers pipeline in hand: the call that a pipeline takes, the output that it gives."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import ConfigError
from ..loading import backbone_from
from .given import Size, Value
from .problem import Aligner
from .result import AlignResult
from .run import align

_OUTPUTS = ("pil", "pt", "np", "latent")

_OWN_WORDS = {
    "steps": "num_inference_steps",
    "seed": "generator",
    "resolution": "height and width",
    "prompts": "prompt",
    "num_images_per_prompt": "particles",
    "embedded_guidance": "guidance_scale",
}
"""What ``align`` or a pipeline calls something, and its name here."""


def steer(
    pipe: Any,
    value: Value,
    prompt: str | Sequence[str],
    method: str | Aligner = "fk-steering",
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    particles: int | None = None,
    generator: int | torch.Generator | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    return_particles: bool = False,
    backbone: Backbone | None = None,
    **settings: Any,
) -> Any:
    """What ``pipe(prompt, ...)`` returns, but of samples that a value steered: the best particle of every prompt.

    ``pipe``: a loaded pipeline that :func:`backbone_from` takes; its modules are shared, its scheduler's settings give
    the noise levels. ``value``, ``method`` and ``settings`` are those of :func:`align` (``reward=`` beside
    ``"tweedie"`` or an estimator, ``strength=``, ``batch=``, ...). ``num_inference_steps`` and ``guidance_scale``: the
    defaults of the pipeline's own call when None (50 steps for SD 1.5 and SDXL, 28 for SD 3 and FLUX); guidance is
    embedded where the network was distilled to read it (FLUX). ``negative_prompt``: one text, as in the pipeline's
    call; it needs classifier-free guidance. ``height`` and ``width`` in pixels, the backbone's own by default.
    ``generator``: a seed, or a generator that one is drawn from; None is seed 0. ``backbone``: the pipeline's, where it
    is at hand already or needs a name (``backbone_from(pipe, name=...)``).

    Returns the pipeline's own output, with ``.images`` as ``output_type`` says (``pil``, ``pt``, ``np`` in [0, 1], or
    ``latent`` as the pipeline packs them), or a tuple without ``return_dict``; no safety checker is run, so what it
    would say is None. With ``return_particles`` the pair of that and the :class:`AlignResult`, which holds all
    particles.

    Raises :class:`ConfigError` for an unknown setting, one out of range or one that the pipeline has no default for,
    and what :func:`backbone_from` and :func:`align` raise.
    """
    if output_type not in _OUTPUTS:
        raise ConfigError(f"output_type is {output_type!r}; choose one of {', '.join(_OUTPUTS)}.")
    for word in settings:
        if word in _OWN_WORDS:
            raise ConfigError(f"steer takes {_OWN_WORDS[word]} in the place of {word}.")
    kind = _output_class(pipe)
    if kind is None and return_dict:
        raise ConfigError(f"{type(pipe).__name__} does not say what its call returns; pass return_dict=False.")
    scale = float(_default(pipe, "guidance_scale")) if guidance_scale is None else guidance_scale
    steps = int(_default(pipe, "num_inference_steps")) if num_inference_steps is None else num_inference_steps
    network, scale = (backbone_from(pipe) if backbone is None else backbone).at_guidance(scale)
    silent = getattr(pipe, "_progress_bar_config", {}).get("disable", False)
    result = align(
        method, network, value, [prompt] if isinstance(prompt, str) else prompt, particles=particles,
        seed=_seed(generator), steps=steps, guidance_scale=scale, negative_prompt=negative_prompt,
        resolution=_resolution(height, width, network), **{"progress": not silent, **settings},
    )  # fmt: skip
    images = _images(pipe, network, result, output_type)
    fields = ("images",) if kind is None else tuple(field.name for field in dataclasses.fields(kind))
    filled = {name: images if name == "images" else None for name in fields}
    output = kind(**filled) if kind is not None and return_dict else tuple(filled.values())
    return (output, result) if return_particles else output


def _default(pipe: Any, name: str) -> float:
    """The default of a number that the pipeline's own call takes."""
    found = inspect.signature(type(pipe).__call__).parameters.get(name)
    if found is None or not isinstance(found.default, int | float):
        raise ConfigError(f"the call of a {type(pipe).__name__} has no {name} by default; pass {name}=.")
    return found.default


def _seed(generator: int | torch.Generator | None) -> int:
    if isinstance(generator, torch.Generator):
        # drawn, not read off: a generator used twice gives other images the second time, as in the pipeline
        return int(torch.randint(2**31, (), generator=generator, device=generator.device))
    if generator is not None and not isinstance(generator, int):
        raise ConfigError(f"generator is a {type(generator).__name__}; give one torch.Generator, or a seed.")
    return generator or 0


def _resolution(height: int | None, width: int | None, backbone: Backbone) -> Size:
    sides = tuple(backbone.native_resolution if side is None else side for side in (height, width))
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


@torch.no_grad()
def _images(pipe: Any, backbone: Backbone, result: AlignResult, output_type: str) -> Any:
    """The best particle of every prompt, as the pipeline hands out its images."""
    found = result.particles
    best = found.latents[torch.arange(len(found.best)), found.best].to(backbone.device)
    if output_type == "latent":
        return backbone.to_pipeline_latents(pipe, best, 0.0).to(backbone.dtype)
    # Decoded again rather than taken from the result, which keeps 256 levels.
    pixels: Tensor = backbone.decode_latents(best)
    return pipe.image_processor.postprocess(pixels * 2 - 1, output_type=output_type)


def _output_class(pipe: Any) -> Any:
    """The dataclass that the pipeline's call says it returns, None where it does not say."""
    returned = inspect.signature(type(pipe).__call__, eval_str=True).return_annotation
    found = [kind for kind in (get_args(returned) or (returned,)) if dataclasses.is_dataclass(kind)]
    return found[0] if found else None
