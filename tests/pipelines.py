"""Real diffusers pipelines at toy size, as folders: what is loaded, damaged and compared. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import diffusers
import torch
import transformers

import families
from stitchvm.core import Backbone, BackboneRecord, Condition, NoisyLatent
from stitchvm.plugins.backbones.flux import FluxBackbone
from stitchvm.plugins.backbones.mmdit import MMDiTBackbone
from stitchvm.plugins.backbones.unet import UNetBackbone

_TRAINED = {name: value for name, value in families.SD_SCHEDULE.items() if name != "clip_sample"}
"""What PNDM and Euler take of :data:`families.SD_SCHEDULE`."""


@attrs.frozen
class Kind:
    """One kind of pipeline: its classes, and the network ``part`` that is cut.

    ``encoders`` are the text encoders' classes in order; ``call`` what the pipeline must be told to read the prompts as
    the tiny network's record says; ``inputs`` draws an ``(x, condition)`` and ``upstream`` the network's ``forward``.
    """

    family: type[Backbone]
    pipeline: type[diffusers.DiffusionPipeline]
    part: str
    network: type[Any]
    architecture: dict[str, Any]
    scheduler: Any
    encoders: tuple[str, ...]
    inputs: Callable[..., tuple[NoisyLatent, Condition]]
    upstream: Callable[..., torch.Tensor]
    absent: tuple[str, ...] = ()
    call: dict[str, Any] = attrs.field(factory=dict)


KINDS: dict[str, Kind] = {
    "sd3": Kind(
        MMDiTBackbone, diffusers.StableDiffusion3Pipeline, "transformer", diffusers.SD3Transformer2DModel,
        families.mmdit_architecture(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ("CLIPTextModelWithProjection",) * 2, families.mmdit_input, families.mmdit_upstream,
        ("text_encoder_3", "tokenizer_3"),
        {"max_sequence_length": 3},
    ),
    "flux": Kind(
        FluxBackbone, diffusers.FluxPipeline, "transformer", diffusers.FluxTransformer2DModel,
        families.flux_architecture(), diffusers.FlowMatchEulerDiscreteScheduler(**families.FLUX_SCHEDULE),
        ("CLIPTextModel", "T5EncoderModel"), families.flux_input, families.flux_upstream,
        ("feature_extractor", "image_encoder"), {"max_sequence_length": 6},
    ),
    "sd": Kind(
        UNetBackbone, diffusers.StableDiffusionPipeline, "unet", diffusers.UNet2DConditionModel,
        families.unet_architecture("sd"), diffusers.PNDMScheduler(**_TRAINED, skip_prk_steps=True),
        ("CLIPTextModel",), families.unet_input, families.unet_upstream,
        ("feature_extractor", "image_encoder", "safety_checker"),
    ),
    "xl": Kind(
        UNetBackbone, diffusers.StableDiffusionXLPipeline, "unet", diffusers.UNet2DConditionModel,
        families.unet_architecture("xl"), diffusers.EulerDiscreteScheduler(**_TRAINED, timestep_spacing="leading"),
        ("CLIPTextModel", "CLIPTextModelWithProjection"), families.unet_input, families.unet_upstream,
        ("feature_extractor", "image_encoder"),
    ),
}  # fmt: skip


def write_pipeline(folder: Path, kind: str = "sd3", *, shard_size: str = "10GB") -> None:
    """A folder as ``save_pretrained`` of the pipeline writes it, its network in shards of ``shard_size``."""
    parts = KINDS[kind]
    torch.manual_seed(0)
    net = parts.network(**parts.architecture[parts.part])
    net.save_pretrained(folder / parts.part, max_shard_size=shard_size)
    diffusers.AutoencoderKL(**parts.architecture["vae"]).save_pretrained(folder / "vae")
    parts.scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": parts.pipeline.__name__,
        parts.part: ["diffusers", parts.network.__name__],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(parts.scheduler).__name__],
        **{name: [None, None] for name in parts.absent},
    }
    if "safety_checker" in parts.absent:
        index["requires_safety_checker"] = False
    for suffix, encoder in zip(("", "_2"), parts.encoders, strict=False):
        tokenizer = _write_t5(folder, suffix) if encoder == "T5EncoderModel" else _write_clip(folder, suffix, encoder)
        index[f"text_encoder{suffix}"] = ["transformers", encoder]
        index[f"tokenizer{suffix}"] = ["transformers", tokenizer]
    (folder / "model_index.json").write_text(json.dumps(index))


def add_t5(folder: Path) -> None:
    """Give an SD 3 pipeline's folder the third text encoder that it may do without."""
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_3"] = ["transformers", _write_t5(folder, "_3")]
    index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def open_pipeline(folder: Path, kind: str = "sd3") -> Any:
    """The real pipeline class on a folder, frozen."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name, origin in index.items() if origin == [None, None]]
    pipeline = KINDS[kind].pipeline.from_pretrained(folder, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline


def pipeline_record(folder: Path, kind: str = "sd3", **fields: Any) -> BackboneRecord:
    fields.setdefault("architecture", KINDS[kind].architecture)
    family = {MMDiTBackbone: "mmdit", FluxBackbone: "flux", UNetBackbone: "unet"}[KINDS[kind].family]
    return BackboneRecord(name=f"tiny-{kind}", family=family, path=str(folder), resolution=16, **fields)


def _write_clip(folder: Path, suffix: str, encoder: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    getattr(transformers, encoder)(config).save_pretrained(folder / f"text_encoder{suffix}")
    return "CLIPTokenizer"


def _write_t5(folder: Path, suffix: str) -> str:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=8)
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    config = transformers.T5Config(vocab_size=len(pieces), d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder / f"text_encoder{suffix}")
    return "T5TokenizerFast"
