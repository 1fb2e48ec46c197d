"""The trainings in the order in which they need each other; each resumes where it stopped."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from . import clip, detector, mmdit, vae
from .data import Pictures, training_set
from .export import export_clip, export_detector, export_mmdit, export_vae
from .loop import Loop, Schedule, Settings, Task, averaged, write_atomically
from .tokens import build_tokenizer

#: Optimiser steps of each model at scale 1.
STEPS = {"vae": 2000, "clip": 1000, "detector": 500, "mmdit": 4200}
#: Scenes whose latents the flow model is trained on.
LATENTS = 40_000
_SHARD = 2000


@attrs.frozen
class Plan:
    """Where the trainings work, where they export to, and how long they run (1 is what the shipped models had).

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
    task = detector.DetectorTask(vae.load(plan.out / "vae"))
    _train(plan, "detector", task)
    averaged(plan.work / "detector.pt", task.modules)
    export_detector(task.net, plan.out / "detector.safetensors")


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


def mmdit_task(plan: Plan, compiled: bool) -> mmdit.MmditTask:
    """The flow model's task on the cached latents of the exported autoencoder."""
    pictures = training_set(plan.work)
    ids = clip.tokenise(build_tokenizer(), pictures.captions[:LATENTS])
    latents = _latents(plan, vae.load(plan.out / "vae"), pictures)
    torch.manual_seed(plan.seed)
    return mmdit.MmditTask(mmdit.Examples(latents, ids), compiled, plan.bfloat16)


def train_mmdit(plan: Plan) -> None:
    """Train and export the flow model; needs the autoencoder."""
    task = mmdit_task(plan, compiled=True)
    _train(plan, "mmdit", task)
    export_checkpoint(plan)


def export_checkpoint(plan: Plan) -> None:
    """Export the flow model as its checkpoint has it, finished or not."""
    modules = mmdit.build_modules()
    averaged(plan.work / "mmdit.pt", modules)
    export_mmdit(vae.load(plan.out / "vae"), modules, plan.out / "shapes-mmdit")


STAGES = {"vae": train_vae, "clip": train_clip, "detector": train_detector, "mmdit": train_mmdit}
