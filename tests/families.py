"""Real upstream classes at toy size: what the plugin tests cut, save and load. Nothing here is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stitchvm.core import Condition, NoisyLatent, RewardRecord
from stitchvm.plugins.backbones.flux import FluxBackbone
from stitchvm.plugins.backbones.mmdit import MMDiTBackbone
from stitchvm.plugins.backbones.unet import UNetBackbone
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


def mmdit_upstream(backbone: MMDiTBackbone, x: NoisyLatent, condition: Condition, net: Any = None) -> torch.Tensor:
    """The upstream network's own ``forward``; of another ``net`` than the backbone's where one is given."""
    return (net or backbone.net)(
        hidden_states=x.latents,
        encoder_hidden_states=condition["embeds"],
        pooled_projections=condition["pooled"],
        timestep=x.sigma * 1000,
    ).sample


FLUX_SCHEDULE: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
}
FLUX_VAE = VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def flux_architecture(**transformer: Any) -> dict[str, Any]:
    """Two double and three single blocks, 16 wide, with embedded guidance; latents of 4 channels."""
    defaults: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    }
    net = defaults | transformer
    return {"transformer": net, "vae": FLUX_VAE, "scheduler": FLUX_SCHEDULE, "max_sequence_length": 6, "sample_size": 8}


def flux(seed: int = 0, **transformer: Any) -> FluxBackbone:
    torch.manual_seed(seed)
    return FluxBackbone.build(flux_architecture(**transformer))


def flux_input(
    backbone: FluxBackbone, batch: int = 3, sides: tuple[int, int] = (8, 12)
) -> tuple[NoisyLatent, Condition]:
    """As :func:`mmdit_input`."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, backbone.latent_channels, *sides, generator=draw)
    embeds = torch.randn(batch, 5, backbone.widths["embeds"], generator=draw)
    pooled = torch.randn(batch, backbone.widths["pooled"], generator=draw)
    return NoisyLatent(latents, torch.linspace(0.05, 0.95, batch)), Condition({"embeds": embeds, "pooled": pooled})


def flux_upstream(backbone: FluxBackbone, x: NoisyLatent, condition: Condition, net: Any = None) -> torch.Tensor:
    """As :func:`mmdit_upstream`, on what the pipeline's own functions make of the latents."""
    from diffusers import FluxPipeline

    (batch, channels, height, width), like = x.latents.shape, (x.latents.device, x.latents.dtype)
    packed = FluxPipeline._pack_latents(x.latents, batch, channels, height, width)
    tokens = (net or backbone.net)(
        hidden_states=packed,
        encoder_hidden_states=condition["embeds"],
        pooled_projections=condition["pooled"],
        timestep=x.sigma,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, *like),
        txt_ids=torch.zeros(condition["embeds"].shape[1], 3),
        guidance=torch.full([batch], 3.5) if backbone.net.config.guidance_embeds else None,
    ).sample
    factor = backbone.latent_factor
    return FluxPipeline._unpack_latents(tokens, height * factor, width * factor, factor)


SD_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
SD_VAE = {name: value for name, value in VAE.items() if "quant_conv" not in name and name != "shift_factor"}
SD_VAE["scaling_factor"] = 0.18215

_UNETS: dict[str, dict[str, Any]] = {
    "sd": {
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 12, 16],
        "layers_per_block": [2, 1, 1],
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    },
    "xl": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": [1, 2],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 16,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
}


def unet_architecture(kind: str = "sd", **unet: Any) -> dict[str, Any]:
    """Like SD 1.5 (``"sd"``, three levels) or SDXL (``"xl"``, two levels, pooled text and sizes); latents of 4
    channels."""
    net = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4}
    return {"unet": net | _UNETS[kind] | unet, "vae": SD_VAE, "scheduler": SD_SCHEDULE, "text_tokens": 8}


def unet(kind: str = "sd", seed: int = 0, **unet: Any) -> UNetBackbone:
    torch.manual_seed(seed)
    return UNetBackbone.build(unet_architecture(kind, **unet))


def unet_input(
    backbone: UNetBackbone, batch: int = 3, sides: tuple[int, int] = (8, 12)
) -> tuple[NoisyLatent, Condition]:
    """As :func:`mmdit_input`."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, backbone.latent_channels, *sides, generator=draw)
    shapes = {"embeds": (batch, 5), "pooled": (batch,)}
    text = {name: torch.randn(*shapes[name], width, generator=draw) for name, width in backbone.widths.items()}
    return NoisyLatent(latents, torch.linspace(0.05, 0.95, batch)), Condition(text)


def unet_upstream(backbone: UNetBackbone, x: NoisyLatent, condition: Condition, net: Any = None) -> torch.Tensor:
    """As :func:`mmdit_upstream`; SDXL's is told the size of an uncropped image that fills the latents."""
    added = {}
    if "pooled" in backbone.widths:
        height, width = (side * backbone.latent_factor for side in x.latents.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(x.latents), -1)
        added["added_cond_kwargs"] = {"text_embeds": condition["pooled"], "time_ids": ids}
    timestep = backbone.time.timestep(x.sigma)
    return (net or backbone.net)(x.latents, timestep, encoder_hidden_states=condition["embeds"], **added).sample


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
