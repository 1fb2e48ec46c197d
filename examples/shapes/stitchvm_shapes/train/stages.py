"""The trainings in the order in which they need each other; each resumes where it stopped."""

from __future__ import annotations

import hashlib
from pathlib import Path

import attrs
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from . import aesthetic, clip, detector, dino, flux, hps, mmdit, unet, vae
from .data import Pictures, training_set
from .export import (
    TOWER,
    export_aesthetic,
    export_clip,
    export_detector,
    export_dino,
    export_flux,
    export_mmdit,
    export_unet,
    export_vae,
)
from .loop import Loop, Schedule, Settings, Task, averaged, write_atomically
from .teacher import Teacher
from .tokens import build_tokenizer

#: Optimiser steps of each model at scale 1. The shipped unet was stopped before its rate had decayed, and had its first
#: 650 steps without `unet.STARTS`.
STEPS = {
    "vae": 2000,
    "clip": 1000,
    "detector": 500,
    "hps": 600,
    "aesthetic": 4000,
    "dino": 850,
    "mmdit": 4200,
    "flux": 1900,
    "unet": 2100,
}
#: Scenes whose latents the backbones are trained on.
LATENTS = 40_000
_SHARD = 2000


@attrs.frozen
class Plan:
    """Where the trainings work, where they export to, and how long they run (1 is what shipped models had).

    `bfloat16` runs the flow model's matrix products in that type: only faster where the processor has them.
    """

    work: Path
    out: Path
    scale: float = 1.0
    seed: int = 0
    bfloat16: bool = False

    def settings(self, name: str) -> Settings:
        steps = max(10, round(STEPS[name] * self.scale))
        return Settings(name, self.work, Schedule(steps, warmup=min(150, steps // 5), decay=0.6), self.seed)


def _train(plan: Plan, name: str, task: Task) -> None:
    loop = Loop(task, plan.settings(name))
    loop.run()


def train_vae(plan: Plan) -> None:
    """Train and export the autoencoder."""
    torch.manual_seed(plan.seed)
    pictures = training_set(plan.work)
    task = vae.VaeTask(pictures)
    _train(plan, "vae", task)
    averaged(plan.work / "vae.pt", task.modules)
    vae.calibrate(task.vae, pictures.images[:2000])
    export_vae(task.vae, plan.out / "vae")


def train_clip(plan: Plan) -> None:
    """Train and export the reward model."""
    torch.manual_seed(plan.seed)
    task = clip.ClipTask()
    _train(plan, "clip", task)
    averaged(plan.work / "clip.pt", task.modules)
    export_clip(task.model, plan.out / "shapes-clip")


def train_detector(plan: Plan) -> None:
    """Train and export the detector; needs the autoencoder."""
    torch.manual_seed(plan.seed)
    task = detector.DetectorTask(vae.load(plan.out))
    _train(plan, "detector", task)
    averaged(plan.work / "detector.pt", task.modules)
    export_detector(task.net, plan.out / "detector.safetensors")


def _forget_older(plan: Plan, name: str, origin: Path) -> None:
    """Delete the checkpoint of a training that began from another file than `origin`, such as an older shapes-clip."""
    note, digest = plan.work / f"{name}.origin", hashlib.sha256(origin.read_bytes()).hexdigest()
    if not (note.exists() and note.read_text() == digest):
        for suffix in (".pt", ".json"):
            (plan.work / f"{name}{suffix}").unlink(missing_ok=True)
        write_atomically(note, lambda path: path.write_text(digest))


def train_hps(plan: Plan) -> None:
    """Finetune and export the preference model; needs shapes-clip."""
    _forget_older(plan, "hps", plan.out / "shapes-clip" / TOWER)
    torch.manual_seed(plan.seed)
    task = hps.HpsTask(plan.out / "shapes-clip")
    _train(plan, "hps", task)
    averaged(plan.work / "hps.pt", task.modules)
    export_clip(task.model, plan.out / "shapes-hps")


def train_aesthetic(plan: Plan) -> None:
    """Train the predictor and put it beside shapes-clip, which it needs."""
    folder = plan.out / "shapes-clip"
    _forget_older(plan, "aesthetic", folder / TOWER)
    torch.manual_seed(plan.seed)
    task = aesthetic.AestheticTask(folder, training_set(plan.work, aesthetic.RATED), plan.seed)
    _train(plan, "aesthetic", task)
    averaged(plan.work / "aesthetic.pt", task.modules)
    export_aesthetic(task.net, folder)


def train_dino(plan: Plan) -> None:
    """Train and export the likeness model; needs shapes-clip, its teacher."""
    _forget_older(plan, "dino", plan.out / "shapes-clip" / TOWER)
    torch.manual_seed(plan.seed)
    task = dino.DinoTask(plan.out / "shapes-clip")
    _train(plan, "dino", task)
    averaged(plan.work / "dino.pt", task.modules)
    export_dino(task.tower, plan.out / "shapes-dino")


def _latents(plan: Plan, model: AutoencoderKL, pictures: Pictures) -> torch.Tensor:
    """Scaled latents of the training scenes, float16, kept in the work folder a shard at a time."""
    parts = []
    for k, images in enumerate(pictures.images[:LATENTS].split(_SHARD)):
        path = plan.work / "latents" / f"{k:03d}.safetensors"
        if not path.exists():
            coded = vae.encode(model, images).half().contiguous()
            write_atomically(path, lambda partial, coded=coded: save_file({"latents": coded}, partial))  # type: ignore[misc]
        parts.append(load_file(path)["latents"])
    return torch.cat(parts)


def _examples(plan: Plan) -> tuple[mmdit.Examples, list[str]]:
    """The cached latents of the exported autoencoder with their captions, as token ids and as text."""
    pictures = training_set(plan.work)
    captions = pictures.captions[:LATENTS]
    latents = _latents(plan, vae.load(plan.out), pictures)
    return mmdit.Examples(latents, clip.tokenise(build_tokenizer(), captions)), captions


def export_checkpoint(plan: Plan, name: str) -> None:
    """Export a backbone as its checkpoint has it, finished or not."""
    build, export = _BACKBONES[name]
    modules = build()
    averaged(plan.work / f"{name}.pt", modules)
    export(vae.load(plan.out), modules, plan.out / f"shapes-{name}")


def train_mmdit(plan: Plan) -> None:
    """Train and export the flow model; needs the autoencoder."""
    examples, _ = _examples(plan)
    torch.manual_seed(plan.seed)
    _train(plan, "mmdit", mmdit.MmditTask(examples, compiled=True, bfloat16=plan.bfloat16))
    export_checkpoint(plan, "mmdit")


def train_flux(plan: Plan) -> None:
    """Train and export the FLUX model; needs the finished flow model, its teacher."""
    examples, captions = _examples(plan)
    teacher = Teacher(plan.out / "shapes-mmdit", compiled=True)
    torch.manual_seed(plan.seed)
    _train(plan, "flux", flux.FluxTask(examples, flux.tokenise_t5(captions), teacher, compiled=True))
    export_checkpoint(plan, "flux")


def train_unet(plan: Plan) -> None:
    """Train and export the UNet; needs the finished flow model, its teacher."""
    examples, _ = _examples(plan)
    teacher = Teacher(plan.out / "shapes-mmdit", compiled=True)
    torch.manual_seed(plan.seed)
    _train(plan, "unet", unet.UnetTask(examples, teacher, compiled=True))
    export_checkpoint(plan, "unet")


_BACKBONES = {
    "mmdit": (mmdit.build_modules, export_mmdit),
    "flux": (flux.build_modules, export_flux),
    "unet": (unet.build_modules, export_unet),
}

STAGES = {
    "vae": train_vae,
    "clip": train_clip,
    "detector": train_detector,
    "hps": train_hps,
    "aesthetic": train_aesthetic,
    "dino": train_dino,
    "mmdit": train_mmdit,
    "flux": train_flux,
    "unet": train_unet,
}
