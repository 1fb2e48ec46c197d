"""The generator: a flow-matching SD3 transformer over the autoencoder's latents, with two small CLIP text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ..constants import SCHEDULER_SHIFT
from ..scenes import MAX_TOKENS
from .clip import tokenise
from .muon import Muon, split_parameters
from .tokens import BEGIN, END, build_tokenizer

WIDTHS = (128, 64)
BLOCKS, HEADS, HEAD_DIM = 8, 5, 32
#: Blocks with a second attention among the image tokens alone, as in SD 3.5 Medium.
DUAL = (0, 1)
BATCH = 128
RATE = 2e-3
#: Part of the captions replaced by the empty prompt, which is what guidance steers away from.
DROPOUT = 0.1


def text_config(width: int) -> CLIPTextConfig:
    """Two layers over the words of the captions; the backbones' text encoders differ in width and in what is read."""
    tokenizer = build_tokenizer()
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END))
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
    )


def build_text_encoder(width: int) -> CLIPTextModelWithProjection:
    """An untrained text encoder; SD3 reads its last layer but one and its projected end token."""
    return CLIPTextModelWithProjection(text_config(width))


def build_transformer() -> SD3Transformer2DModel:
    """The untrained transformer; modulations and output start at zero, so each block starts as the identity."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=8,
        dual_attention_layers=DUAL,
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_modules() -> dict[str, nn.Module]:
    """All that is trained: the transformer and its text encoders, by the names the checkpoint uses."""
    modules: dict[str, nn.Module] = {"transformer": build_transformer()}
    return modules | {f"text_encoder_{k}": build_text_encoder(width) for k, width in enumerate(WIDTHS)}


def encode_ids(encoders: list[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt(max_sequence_length=MAX_SEQUENCE_LENGTH)` computes from token ids.

    Returns the token features [B, 24, 192] and the pooled features [B, 192].
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return tokens, torch.cat([output.text_embeds for output in outputs], -1)


@attrs.frozen
class Examples:
    """Scaled latents [N, 8, 16, 16] (float16 to save memory) and token ids [N, 24] of their captions."""

    latents: Tensor
    ids: Tensor


class MmditTask:
    """Flow matching: z_t = (1 - t) z_0 + t eps, target eps - z_0, t logit-normal."""

    def __init__(self, examples: Examples, compiled: bool = False, bfloat16: bool = False) -> None:
        self.bfloat16 = bfloat16
        self.modules = build_modules()
        self.transformer = self.modules["transformer"]
        self.encoders = [self.modules[f"text_encoder_{k}"] for k in range(len(WIDTHS))]
        self.examples = examples
        self.empty = tokenise(build_tokenizer(), [""])[0]
        self.forward: Any = torch.compile(self.transformer) if compiled else self.transformer

    def optimizers(self) -> list[torch.optim.Optimizer]:
        skipped = ("embed", "norm", "proj_out")
        matrices, others = split_parameters(self.modules.values(), lambda name: any(word in name for word in skipped))
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(self.examples.ids), (BATCH,), generator=generator)
        clean, ids = self.examples.latents[index].float(), self.examples.ids[index]
        dropped = torch.rand(BATCH, generator=generator) < DROPOUT
        ids = torch.where(dropped[:, None], self.empty, ids)
        t = torch.randn(BATCH, generator=generator).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        part = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            tokens, pooled = encode_ids(self.encoders, ids)
            velocity = self.forward(
                hidden_states=(1 - part) * clean + part * noise,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                timestep=t * 1000,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - clean), {}


def pipeline(vae: AutoencoderKL, transformer: SD3Transformer2DModel, encoders: list[Any]) -> StableDiffusion3Pipeline:
    """An ordinary SD3 pipeline without a T5 encoder."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=build_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load(folder: Path) -> StableDiffusion3Pipeline:
    """The exported pipeline, float32."""
    pipe: StableDiffusion3Pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
