"""Opening the parts of a diffusers pipeline folder one by one, strictly and without building what is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import nn

from stitchvm.core import Backbone, BackboneRecord, WeightsError, resolve_source

from ..checkpoints import differing, load_strictly, read_json, read_tensors, shards

WEIGHTS = "diffusion_pytorch_model"


class Fetch(Protocol):
    """The local folder of a pipeline, with the files that match ``patterns`` in it."""

    def __call__(self, *patterns: str) -> Path: ...


def fetcher(record: BackboneRecord, token: str | None, local_files_only: bool) -> Fetch:
    """A :class:`Fetch` for a record's folder or hub repository: files are downloaded when they are first asked for."""

    def fetch(*patterns: str) -> Path:
        return resolve_source(record, patterns=patterns, token=token, local_files_only=local_files_only)

    return fetch


def on_meta(make: Callable[[], nn.Module]) -> Any:
    """A frozen module without memory for its weights."""
    with torch.device("meta"):
        return make().requires_grad_(False).eval()


def random_vae(config: Mapping[str, Any], seed: int) -> AutoencoderKL:
    """A frozen VAE with random weights drawn from ``seed``; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**config).requires_grad_(False).eval()


def load_part(
    fetch: Fetch,
    part: nn.Module,
    name: str,
    *,
    prefixes: tuple[str, ...] | None = None,
    rename: Callable[[str], str] = str,
    **to: Any,
) -> None:
    """Read the pipeline's part ``name`` (only the tensors below ``prefixes``) into ``part``.

    ``rename`` gives a tensor's name in ``part`` for its name on disk; ``to`` takes the ``dtype`` and ``device`` they
    are wanted in. Raises :class:`WeightsError` unless they are exactly the tensors that ``part`` has.
    """
    folder = fetch("*.json") / name
    files = shards(folder, WEIGHTS, prefixes)
    fetch(*(f"{name}/{file.name}" for file in files))
    tensors = read_tensors(files, prefixes=prefixes, **to)
    load_strictly(part, {rename(name): tensor for name, tensor in tensors.items()}, folder)


def read_config(folder: Path, kind: type, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one part of a pipeline.

    Raises :class:`WeightsError` when it is missing, of another class than ``kind``, or contradicts ``expected``.
    """
    owner = folder.parent / "model_index.json"
    if not folder.is_dir() and owner.is_file():
        raise WeightsError(
            f"{owner} describes a pipeline ({read_json(owner).get('_class_name')}) without a {folder.name}, which a "
            f"{kind.__name__} is expected in; it is incomplete or of another family: check the name or the path."
        )
    file = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    config = read_json(file)
    if config.get("_class_name") != kind.__name__:
        raise WeightsError(
            f"{file} describes a {config.get('_class_name')}, expected a {kind.__name__}; choose another model."
        )
    if conflict := differing(expected, config):
        raise WeightsError(
            f"{file} is of another architecture than the registry's: {conflict}. Correct the name or the path."
        )
    return config


def loaded_part(pipeline: Any, name: str, kind: Any, expected: Mapping[str, Any]) -> Any:
    """The part ``name`` of a loaded pipeline: the module itself, also where ``torch.compile`` wraps it.

    Raises :class:`WeightsError` when it is no ``kind``, contradicts ``expected``, or lies where only the pipeline's own
    calls fetch it from (offload).
    """
    part = getattr(pipeline, name, None)
    part = getattr(part, "_orig_mod", part)
    owner = type(pipeline).__name__
    if not isinstance(part, kind):
        raise WeightsError(
            f"the {name} of this {owner} is a {type(part).__name__}, expected a {kind.__name__}; "
            "load the pipeline with one, or give another pipeline."
        )
    if hasattr(part, "_hf_hook"):
        raise WeightsError(
            f"the {name} of this {owner} is offloaded, so that only the pipeline's own calls find its weights; "
            "call remove_all_hooks() on the pipeline and move it to its device."
        )
    if conflict := differing(expected, part.config):
        raise WeightsError(
            f"the {name} of this {owner} is of another architecture than the registry's: {conflict}. "
            "Correct the name, or leave it out."
        )
    return part


def fill(backbone: Backbone, fetch: Fetch, name: str, cut: int | None, **to: Any) -> Backbone:
    """A weightless backbone with those of the pipeline's part ``name``; with a ``cut``, its head alone, for which
    nothing else is read. ``to`` as in :func:`load_part`.

    Raises :class:`SliceError` for a cut that does not exist, :class:`WeightsError` as :func:`load_part`.
    """
    if cut is None:
        load_part(fetch, backbone.net, name, **to)
        return backbone
    backbone.check_cut(cut)
    stop = max(cut, 0)  # a value model at LATENT still asks the stem for the device
    part = backbone.prune(0, stop)
    part.companions = backbone.companions
    load_part(fetch, part.net, name, prefixes=backbone.tensor_prefixes(0, stop), **to)
    return part


def open_vae(fetch: Fetch, config: Mapping[str, Any]) -> AutoencoderKL:
    """The frozen VAE of a pipeline folder, in float32."""
    vae = on_meta(lambda: AutoencoderKL.from_config(dict(config)))
    load_part(fetch, vae, "vae", rename=_renamed_attention, dtype=torch.float32)
    return vae


_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How the attention of early checkpoints (Stable Diffusion 1) names its layers, and how diffusers does now."""


def _renamed_attention(name: str) -> str:
    block, _, layer = name.rpartition(".")[0].rpartition(".")
    if layer not in _RENAMED or "attentions" not in block.split("."):
        return name
    return f"{block}.{_RENAMED[layer]}.{name.rpartition('.')[2]}"


def open_sd3_text(fetch: Fetch, joint_attention_dim: int, dtype: torch.dtype) -> Any:
    """A ``StableDiffusion3Pipeline`` with nothing but its text encoders and tokenizers."""
    from diffusers import StableDiffusion3Pipeline
    from safetensors import SafetensorError

    # Only the files in the model's own precision: repositories hold an fp16 variant of each beside them.
    folder = fetch("*.json", "tokenizer*/*", "text_encoder*/model.safetensors", "text_encoder*/model-*.safetensors")
    index = read_json(folder / "model_index.json")
    absent = [name for name, origin in index.items() if isinstance(origin, list) and origin[0] is None]
    left_out = dict.fromkeys(("transformer", "vae", *absent))
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, **left_out, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"the text encoders in {folder} cannot be read: {error}") from error
    # encode_prompt reads the width of an absent T5's zeros from the denoiser's configuration, and nothing else of it.
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=joint_attention_dim))
    return pipeline


def open_clip_text(fetch: Fetch, kind: Any, dtype: torch.dtype) -> Any:
    """A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline`` (``kind``) with nothing but its text side."""
    from safetensors import SafetensorError

    # Only the files in the model's own precision, as for SD3.
    folder = fetch("*.json", "tokenizer*/*", "text_encoder*/model.safetensors", "text_encoder*/model-*.safetensors")
    index = read_json(folder / "model_index.json")
    text = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "scheduler")
    left_out = [name for name, origin in index.items() if isinstance(origin, list) and name not in text]
    # Not asked for, and asking for none keeps SD1.5's pipeline from warning that there is none.
    checker = {"requires_safety_checker": False} if "safety_checker" in index else {}
    try:
        return kind.from_pretrained(
            folder, **dict.fromkeys(left_out), **checker, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"the text encoders in {folder} cannot be read: {error}") from error


def open_flux_text(fetch: Fetch, dtype: torch.dtype) -> Any:
    """A ``FluxPipeline`` with nothing but its text encoders and tokenizers."""
    from diffusers import FluxPipeline

    return open_clip_text(fetch, FluxPipeline, dtype)
