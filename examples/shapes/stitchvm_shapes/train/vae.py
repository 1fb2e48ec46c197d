"""The autoencoder: 64 x 64 pictures to 16 x 16 x 8 latents and back."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .data import Pictures, as_float

#: Weight of the KL term in nats per latent number: just enough that the latents stay bounded and smooth.
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
RATE = 1.5e-3
BATCH = 8


def build() -> AutoencoderKL:
    """The untrained autoencoder (about 1 M parameters)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + L1 of the pixel differences; images [B, 3, H, W] in -1 .. 1."""
    loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    for ours, theirs in zip(_edges(output), _edges(target), strict=True):
        loss = loss + EDGE_WEIGHT * F.l1_loss(ours, theirs)
    return loss


class VaeTask:
    """Trains the autoencoder on training pictures."""

    def __init__(self, pictures: Pictures) -> None:
        self.vae = build()
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.images = pictures.images

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(self.images), (BATCH,), generator=generator)
        target = as_float(self.images[index]) * 2 - 1
        posterior = self.vae.encode(target).latent_dist
        output = self.vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(output, target) + KL_WEIGHT * kl
        return loss, {"kl": float(kl.detach()), "psnr": psnr(output.detach() / 2, target / 2)}


def psnr(output: Tensor, target: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB over the batch, for images whose range is one wide."""
    error = (output - target).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 250) -> Tensor:
    """Scaled posterior means [N, 8, 16, 16] of uint8 images: what the flow model lives on."""
    means = [vae.encode(as_float(part) * 2 - 1).latent_dist.mean for part in images.split(batch)]
    return (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 250) -> Tensor:
    """Pictures float [N, 3, 64, 64] in 0 .. 1 of scaled latents."""
    parts = (latents / vae.config.scaling_factor + vae.config.shift_factor).split(batch)
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in parts])


def calibrate(vae: AutoencoderKL, images: Tensor) -> None:
    """Set scaling and shift so that the scaled latents of `images` have mean 0 and deviation 1."""
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = encode(vae, images)
    vae.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 5), shift_factor=round(float(latents.mean()), 5)
    )


@torch.no_grad()
def evaluate(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Held-out reconstruction: PSNR in dB of uint8 images, coded by their posterior mean."""
    output = decode(vae, encode(vae, images))
    latents = encode(vae, images)
    return {
        "psnr": psnr(output, as_float(images)),
        "latent_mean": float(latents.mean()),
        "latent_std": float(latents.std()),
    }


def load(out: Path) -> AutoencoderKL:
    """The autoencoder of a folder of exported models, float32: its own, or shapes-mmdit's."""
    folder = next((place for place in (out / "vae", out / "shapes-mmdit" / "vae") if place.exists()), out / "vae")
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    return vae.eval()
