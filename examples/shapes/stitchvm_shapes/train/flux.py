"""A FLUX transformer over the same latents, distilled from the guided SD3 model, as FLUX.1 dev is from its teacher.

Its double blocks begin as the SD3 model's. What FLUX has otherwise (a T5, rotary places in the stead of added ones, no
dual attention) first learns to give these blocks the states they had there; only then does guidance come in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from ..constants import SCHEDULER_SHIFT
from ..scenes import MAX_TOKENS
from . import mmdit
from .mmdit import Examples
from .muon import Muon, split_parameters
from .teacher import Teacher
from .tokens import build_t5_tokenizer, build_tokenizer

#: Blocks of the SD3 model that the double blocks start from.
DOUBLE = (0, 1, 2, 3, 4, 5)
SINGLE = 3
CLIP_WIDTH, T5_WIDTH = 64, 128
#: How a head's 32 channels count an image token's place: (unused, row, column). Half are left as the SD3 model has
#: them, which knows no rotation.
ROPE = (16, 8, 8)
BATCH = 64
#: Steps that fit the text encoders alone, and steps after these that fit the double blocks' states too.
TEXT_STEPS, FOLLOWING_STEPS = 300, 400
RATE = 1e-3
DROPOUT = 0.1
#: Guidance scales that the network learns to read.
SCALES = (1.0, 4.0)


def build_transformer() -> FluxTransformer2DModel:
    """The untrained transformer; single blocks start as the identity."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=len(DOUBLE),
        num_single_layers=SINGLE,
        attention_head_dim=mmdit.HEAD_DIM,
        num_attention_heads=mmdit.HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )
    for block in model.single_transformer_blocks:
        nn.init.zeros_(block.norm.linear.weight)
        nn.init.zeros_(block.norm.linear.bias)
    return model


def build_t5() -> T5EncoderModel:
    """An untrained two-layer text encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(build_t5_tokenizer()),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=T5_WIDTH // 32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_modules() -> dict[str, nn.Module]:
    """All that is trained, by the names the checkpoint uses."""
    clip = CLIPTextModel(mmdit.text_config(CLIP_WIDTH))
    return {"transformer": build_transformer(), "text_encoder_0": clip, "text_encoder_1": build_t5()}


@torch.no_grad()
def start_from(model: FluxTransformer2DModel, source: SD3Transformer2DModel) -> None:
    """Copy what an SD3 transformer has in the same form: blocks, time embedding, patches in and out.

    FLUX packs a patch channel first, where SD3's output has the channel last.
    """
    for block, number in zip(model.transformer_blocks, DOUBLE, strict=True):
        # Of a block with dual attention, what belongs to the first; its modulations come first.
        state = source.transformer_blocks[number].state_dict()
        block.load_state_dict({name: state[name][: len(old)] for name, old in block.state_dict().items()})
    model.time_text_embed.timestep_embedder.load_state_dict(source.time_text_embed.timestep_embedder.state_dict())
    for parameter in model.time_text_embed.guidance_embedder.linear_2.parameters():
        parameter.zero_()
    model.norm_out.load_state_dict(source.norm_out.state_dict(), strict=False)
    model.x_embedder.weight.copy_(source.pos_embed.proj.weight.flatten(1))
    model.x_embedder.bias.copy_(source.pos_embed.proj.bias)
    for ours, theirs in ((model.proj_out.weight, source.proj_out.weight), (model.proj_out.bias, source.proj_out.bias)):
        ours.copy_(theirs.unflatten(0, (2, 2, 8)).movedim(2, 0).flatten(0, 2))


def places(rows: int, columns: int) -> Tensor:
    """`FluxPipeline`'s ids of image tokens [rows * columns, 3]: (0, row, column), row by row."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


@contextlib.contextmanager
def states_after(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The image tokens' states that `blocks` return while this is open, in the order of the calls."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: states.append(output[1])) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared error as a part of the target's variance."""
    return F.mse_loss(ours, theirs) / theirs.var()


class FluxTask:
    """Regression on the teacher's guided velocity at noised latents; the guidance scale is an input."""

    def __init__(self, examples: Examples, t5_ids: Tensor, teacher: Teacher, compiled: bool = False) -> None:
        self.modules = build_modules()
        self.transformer: Any = self.modules["transformer"]
        start_from(self.transformer, teacher.transformer)
        self.examples, self.t5_ids, self.teacher = examples, t5_ids, teacher
        self.empty_t5 = tokenise_t5([""])[0]
        self.forward: Any = torch.compile(self.transformer) if compiled else self.transformer

    def optimizers(self) -> list[torch.optim.Optimizer]:
        skipped = ("embed", "norm", "proj_out", "shared", "relative_attention_bias")
        matrices, others = split_parameters(self.modules.values(), lambda name: any(word in name for word in skipped))
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def predict(self, noisy: Tensor, t: Tensor, scale: Tensor, ids: Tensor, t5_ids: Tensor, forward: Any) -> Tensor:
        """The velocity [B, 8, 16, 16] under token ids [B, 24] of both tokenizers."""
        tokens = self.modules["text_encoder_1"](t5_ids)[0]
        packed = F.pixel_unshuffle(noisy, 2)
        output = forward(
            hidden_states=packed.flatten(2).transpose(1, 2),
            encoder_hidden_states=tokens,
            pooled_projections=self.modules["text_encoder_0"](ids).pooler_output,
            timestep=t,
            guidance=scale,
            img_ids=places(*packed.shape[-2:]),
            txt_ids=torch.zeros(tokens.shape[1], 3),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, packed.shape[-2:]), 2)

    def text_loss(self, ids: Tensor, t5_ids: Tensor) -> Tensor:
        """How far what the blocks read of a caption is from what the teacher's blocks read of it.

        CLIP's tokens begin with one that T5's lack.
        """
        source = self.teacher.transformer
        with torch.no_grad():
            tokens, pooled = mmdit.encode_ids(self.teacher.encoders, ids)
            tokens, pooled = source.context_embedder(tokens[:, 1:]), source.time_text_embed.text_embedder(pooled)
        ours = self.transformer.context_embedder(self.modules["text_encoder_1"](t5_ids)[0][:, :-1])
        ours_pooled = self.modules["text_encoder_0"](ids).pooler_output
        ours_pooled = self.transformer.time_text_embed.text_embedder(ours_pooled)
        return relative_error(ours, tokens) + relative_error(ours_pooled, pooled)

    def following_loss(self, noisy: Tensor, t: Tensor, ids: Tensor, t5_ids: Tensor) -> Tensor:
        """How far the double blocks' states are from the teacher's, and the velocity without guidance from its."""
        theirs = [self.teacher.transformer.transformer_blocks[k] for k in DOUBLE]
        with states_after(theirs) as wanted:
            target = self.teacher.velocity(noisy, t, ids, compiled=False)
        with states_after(self.transformer.transformer_blocks) as states:
            velocity = self.predict(noisy, t, torch.ones_like(t), ids, t5_ids, self.transformer)
        followed = torch.stack([relative_error(a, b) for a, b in zip(states, wanted, strict=True)]).mean()
        return F.mse_loss(velocity, target) + followed

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(self.examples.ids), (BATCH,), generator=generator)
        clean, ids, t5_ids = self.examples.latents[index].float(), self.examples.ids[index], self.t5_ids[index]
        dropped = (torch.rand(BATCH, generator=generator) < DROPOUT)[:, None]
        ids = torch.where(dropped, self.teacher.empty, ids)
        t5_ids = torch.where(dropped, self.empty_t5, t5_ids)
        if step < TEXT_STEPS:
            return self.text_loss(ids, t5_ids), {}
        t = torch.randn(BATCH, generator=generator).sigmoid()
        noisy = clean.lerp(torch.randn(clean.shape, generator=generator), t[:, None, None, None])
        if step < TEXT_STEPS + FOLLOWING_STEPS:
            return self.following_loss(noisy, t, ids, t5_ids), {}
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(BATCH, generator=generator)
        target = self.teacher.guided(noisy, t, ids, scale)
        return F.mse_loss(self.predict(noisy, t, scale, ids, t5_ids, self.forward), target), {}


def tokenise_t5(captions: list[str]) -> Tensor:
    """Token ids int64 [B, 24] as `FluxPipeline` makes them with `max_sequence_length=24`."""
    ids: Tensor = build_t5_tokenizer()(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def pipeline(vae: AutoencoderKL, modules: dict[str, Any]) -> FluxPipeline:
    """An ordinary FLUX pipeline."""
    return FluxPipeline(
        transformer=modules["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
        vae=vae,
        text_encoder=modules["text_encoder_0"],
        tokenizer=build_tokenizer(),
        text_encoder_2=modules["text_encoder_1"],
        tokenizer_2=build_t5_tokenizer(),
    )


def load(folder: Path) -> FluxPipeline:
    """The exported pipeline, float32."""
    pipe: FluxPipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
