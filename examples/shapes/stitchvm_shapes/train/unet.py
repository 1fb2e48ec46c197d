"""A Stable Diffusion 1.5 UNet over the same latents (variance preserving, predicts the noise), taught by the SD3
model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from . import mmdit
from .mmdit import Examples
from .muon import Muon, split_parameters
from .teacher import Teacher
from .tokens import build_tokenizer

TEXT_WIDTH = 128
CHANNELS = (64, 128)
HEADS = 4
BATCH = 64
RATE = 1e-3
DROPOUT = 0.1
#: Part of the samples that are what sampling starts from: noise alone, at the last time. Of the noisiest latents of
#: real scenes the ground can still be read, so that from these alone it is long not asked of the caption.
STARTS = 0.15


def build_unet() -> UNet2DConditionModel:
    """The untrained network: convolutions at 16 x 16, attention at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # Heads in spite of its name, as in every SD 1.5 configuration.
        attention_head_dim=HEADS,
        norm_num_groups=32,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, sampled from the last one on, where alone starts are trained."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def build_modules() -> dict[str, nn.Module]:
    """All that is trained, by the names the checkpoint uses."""
    return {"unet": build_unet(), "text_encoder_0": CLIPTextModel(mmdit.text_config(TEXT_WIDTH))}


class UnetTask:
    """Regression on the noise that the teacher sees in variance preserving latents.

    Its flow-matching latents are the same ones divided by `alpha + sigma`, at `t = sigma / (alpha + sigma)`. A Stable
    Diffusion pipeline knows no shift of its latents, so theirs is left out here.
    """

    def __init__(self, examples: Examples, teacher: Teacher, compiled: bool = False) -> None:
        self.modules = build_modules()
        self.examples, self.teacher = examples, teacher
        signal = scheduler().alphas_cumprod
        self.alpha, self.sigma = signal.sqrt(), (1 - signal).sqrt()
        #: The flow's level at each of the UNet's times.
        self.t = self.sigma / (self.alpha + self.sigma)
        self.modules["unet"].to(memory_format=torch.channels_last)
        self.forward: Any = torch.compile(self.modules["unet"]) if compiled else self.modules["unet"]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        skipped = ("embed", "norm", "conv_in", "conv_out")
        matrices, others = split_parameters(self.modules.values(), lambda name: any(word in name for word in skipped))
        return [Muon(matrices, RATE), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def noise_seen(self, noisy: Tensor, time: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
        """The teacher's noise in latents [B, 8, 16, 16] at the UNet's times [B]; where `starts`, these are noise alone,
        and of the clean latent it only knows what the caption says."""
        alpha, sigma = self.alpha[time], self.sigma[time]
        t = (sigma / (alpha + sigma)).where(~starts, 1.0)
        scale = (alpha + sigma).where(~starts, 1.0)
        alpha, sigma, level, scale = (one[:, None, None, None] for one in (alpha, sigma, t, scale))
        flowing = noisy / scale - (1 - level) * self.teacher.vae_shift
        clean = flowing - level * self.teacher.velocity(flowing, t, ids) + self.teacher.vae_shift
        return (noisy - alpha * clean) / sigma

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(self.examples.ids), (BATCH,), generator=generator)
        clean, ids = self.examples.latents[index].float() + self.teacher.vae_shift, self.examples.ids[index]
        dropped = torch.rand(BATCH, generator=generator) < DROPOUT
        ids = torch.where(dropped[:, None], self.teacher.empty, ids)
        time = torch.searchsorted(self.t, torch.randn(BATCH, generator=generator).sigmoid()).clamp(max=len(self.t) - 1)
        starts = torch.rand(BATCH, generator=generator) < STARTS
        time = time.where(~starts, len(self.t) - 1)
        alpha, sigma = self.alpha[time, None, None, None], self.sigma[time, None, None, None]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.where(starts[:, None, None, None], noise, alpha * clean + sigma * noise)
        tokens = self.modules["text_encoder_0"](ids)[0]
        predicted = self.forward(noisy, time, tokens, return_dict=False)[0]
        error = predicted - self.noise_seen(noisy, time, ids, starts)
        # The velocity's error: the noise's alone hardly counts the highest levels, where the ground is decided.
        each = ((alpha + sigma) / alpha * error).square().mean((1, 2, 3))
        return each.mean(), {"starts": float(each.detach()[starts].mean())}


def pipeline(vae: AutoencoderKL, modules: dict[str, Any]) -> StableDiffusionPipeline:
    """An ordinary Stable Diffusion pipeline; `vae` must have no shift."""
    return StableDiffusionPipeline(
        unet=modules["unet"],
        scheduler=scheduler(),
        vae=vae,
        text_encoder=modules["text_encoder_0"],
        tokenizer=build_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(folder: Path) -> StableDiffusionPipeline:
    """The exported pipeline, float32."""
    pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
