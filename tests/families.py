"""Real upstream classes at toy size: what the plugin tests cut, save and load. Nothing here is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stitchvm.core import BackboneRecord, Condition, NoisyLatent, RewardRecord
from stitchvm.plugins.backbones.mmdit import MMDiTBackbone
from stitchvm.plugins.rewards.clip import ClipReward

VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def mmdit_architecture(**transformer: Any) -> dict[str, Any]:
    """Four joint blocks, the first two with dual attention, 16 wide; latents of 4 channels, at most 24 a side."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 12,
        "dual_attention_layers": [0, 1],
        "qk_norm": "rms_norm",
    }
    return {"transformer": defaults | transformer, "vae": VAE, "scheduler": {"shift": 3.0}, "max_sequence_length": 3}


def mmdit(seed: int = 0, **transformer: Any) -> MMDiTBackbone:
    torch.manual_seed(seed)
    return MMDiTBackbone.build(mmdit_architecture(**transformer))


def mmdit_input(
    backbone: MMDiTBackbone, batch: int = 3, sides: tuple[int, int] = (8, 12)
) -> tuple[NoisyLatent, Condition]:
    """Random latents, not square unless asked, every sample at a noise level of its own."""
    draw = torch.Generator().manual_seed(1)
    config = backbone.net.config
    latents = torch.randn(batch, config.in_channels, *sides, generator=draw)
    sigma = torch.linspace(0.05, 0.95, batch)
    embeds = torch.randn(batch, 5, config.joint_attention_dim, generator=draw)
    pooled = torch.randn(batch, config.pooled_projection_dim, generator=draw)
    return NoisyLatent(latents, sigma), Condition({"embeds": embeds, "pooled": pooled})


def clip_architecture(vision: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Three blocks, 16 wide, a 4x4 grid of 7-pixel patches."""
    return {
        "embed_dim": 12,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 28, "layers": 3, "width": 16, "head_width": 8, "patch_size": 7, **(vision or {})},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
        **settings,
    }


def clip(seed: int = 0, vision: dict[str, Any] | None = None, **settings: Any) -> ClipReward:
    torch.manual_seed(seed)
    return ClipReward.build(clip_architecture(vision, **settings))


def write_clip(folder: Path, architecture: dict[str, Any] | None = None) -> ClipReward:
    """An open_clip ``local-dir:`` folder; returns the reward whose weights it holds."""
    architecture = architecture or clip_architecture()
    torch.manual_seed(0)
    reward = ClipReward.build(architecture)
    assert reward.companions is not None
    tensors = {f"visual.{name}": tensor for name, tensor in reward.net.state_dict().items()}
    tensors |= reward.companions.model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "open_clip_model.safetensors")
    model = {name: value for name, value in architecture.items() if name != "preprocess_cfg"}
    config = {"model_cfg": model, "preprocess_cfg": architecture.get("preprocess_cfg", {"size": 28})}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return reward


def clip_record(folder: Path, **fields: Any) -> RewardRecord:
    return RewardRecord(name="tiny-clip", family="clip", path=str(folder), **fields)


def write_pipeline(folder: Path, *, shard_size: str = "10GB") -> None:
    """A diffusers ``StableDiffusion3Pipeline`` folder with two small CLIP text encoders and no T5."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(0)
    SD3Transformer2DModel(**mmdit_architecture()["transformer"]).save_pretrained(
        folder / "transformer", max_shard_size=shard_size
    )
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    for suffix in ("", "_2"):
        _write_text_encoder(folder, suffix)
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _write_text_encoder(folder: Path, suffix: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=8)
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
        )
    ).save_pretrained(folder / f"text_encoder{suffix}")  # fmt: skip


def pipeline_record(folder: Path, **fields: Any) -> BackboneRecord:
    fields.setdefault("architecture", mmdit_architecture())
    return BackboneRecord(name="tiny-sd3", family="mmdit", path=str(folder), resolution=16, **fields)
