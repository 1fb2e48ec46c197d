"""The model card: what was trained, for how long, and how good it is, all measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ..constants import GUIDANCE, MAX_SEQUENCE_LENGTH, SCHEDULER_SHIFT, STEPS
from ..detector import Detector
from ..scenes import vocabulary
from . import clip, detector, mmdit, vae
from .data import held_out
from .stages import LATENTS, Plan
from .tokens import build_tokenizer

_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")


def measure_mmdit(folder: Path, judge: Detector, count: int) -> dict[str, float]:
    """Part of `count` held-out captions whose generated picture fulfils them, whole and by attribute."""
    captions = held_out(1000).captions[:count]
    images = mmdit.generate(mmdit.load(folder), captions, GUIDANCE, STEPS)
    rates = judge.attributes(images, captions)
    numbers = {name: round(float(rate.mean()), 4) for name, rate in rates.items()}
    for n in (1, 2, 3):
        those = [rates["fulfilled"][k] for k, c in enumerate(captions) if len(c.split(" a ")) == n + 1]
        numbers[f"fulfilled_{n}"] = round(float(torch.stack(those).mean()), 4) if those else float("nan")
    return {**numbers, "captions": count}


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure(plan: Plan, prompts: int = 200) -> dict[str, Any]:
    """Held-out metrics of every exported model, with parameter counts."""
    pictures = held_out()
    coder = vae.load(plan.out / "vae")
    report: dict[str, Any] = {"vae": {**vae.evaluate(coder, pictures.images), "parameters": _parameters(coder)}}
    if (plan.out / "shapes-clip").exists():
        model = clip.load(plan.out / "shapes-clip")
        numbers = clip.recall(*clip.embed(model, build_tokenizer(), pictures))
        report["clip"] = {**numbers, "parameters": _parameters(model)}
    if (plan.out / "detector.safetensors").exists():
        judge = Detector.load(plan.out / "detector.safetensors")
        report["detector"] = {**detector.evaluate(judge, coder), "parameters": _parameters(judge.net)}
        if (plan.out / "shapes-mmdit").exists():
            numbers = measure_mmdit(plan.out / "shapes-mmdit", judge, prompts)
            pipe = mmdit.load(plan.out / "shapes-mmdit")
            parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
            report["mmdit"] = {**numbers, "parameters": sum(_parameters(part) for part in parts)}
    record = plan.out / "training.json"
    before = json.loads(record.read_text())["models"] if record.exists() else {}
    for name, numbers in report.items():
        numbers |= training_of(plan.work / f"{name}.json", before.get(name, {}))
    return report


def training_of(log: Path, before: dict[str, Any]) -> dict[str, Any]:
    """How a model was trained: from this work folder's log, or as recorded when it was not trained here again."""
    if not log.exists():
        return {key: before[key] for key in before if key in ("steps", "minutes") or key.startswith("train_")}
    trained = json.loads(log.read_text())
    last = trained["log"][-1] if trained["log"] else {}
    numbers = {"steps": trained["step"], "minutes": round(trained["seconds"] / 60, 1)}
    return numbers | {f"train_{key}": value for key, value in last.items() if key not in ("step", "seconds")}


def write(plan: Plan, report: dict[str, Any]) -> None:
    """Write `training.json` and `README.md` beside the models."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    record = {"models": report, "seed": plan.seed, "versions": versions, "threads": torch.get_num_threads()}
    (plan.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (plan.out / "README.md").write_text(_text(record))


def _table(numbers: dict[str, Any]) -> str:
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value:,} |"
        for key, value in numbers.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _text(record: dict[str, Any]) -> str:
    sections = "\n\n".join(f"### {name}\n\n{_table(numbers)}" for name, numbers in record["models"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""# The models of stitchvm-shapes

Small but real models of captioned 64 x 64 scenes, all trained from nothing by `python -m stitchvm_shapes.train`.
Weights are float16 safetensors under Apache-2.0. The training data is drawn by this package, so no third party's
pictures are in it.

- `vae/`: diffusers `AutoencoderKL`, latents 8 x 16 x 16, shifted and scaled to mean 0 and deviation 1.
- `shapes-mmdit/`: diffusers `StableDiffusion3Pipeline` (`SD3Transformer2DModel`, two CLIP text encoders, no T5). Load
  it with `dtype=torch.float32, text_encoder_3=None, tokenizer_3=None` and call it with
  `max_sequence_length={MAX_SEQUENCE_LENGTH}`: it was trained without place-holder tokens for T5. Scheduler
  shift {SCHEDULER_SHIFT}; recommended guidance scale {GUIDANCE}, {STEPS} Euler steps, 64 x 64 pixels. Flow matching on
  {LATENTS:,} scenes, with the empty prompt in one case of ten.
- `shapes-clip/`: open_clip model, `open_clip.create_model_from_pretrained("local-dir:...")`.
- `detector.safetensors`: says whether a picture fulfils a caption (`stitchvm_shapes.detector.Detector`).

Captions have a vocabulary of {len(vocabulary())} words and a fixed grammar; other sentences mean nothing to these
models. One caption in ten, chosen by a hash of its text, is held out from every training; all figures below are for
held-out captions.

## Measured

{sections}

`minutes` is the time spent in the training loop, on two processor cores shared with other work. `train_*` are means
over 100 steps near the end. `fulfilled` is the part of generated pictures in which the detector finds the whole
caption, `fulfilled_n` the same for captions of n objects. Seed {record["seed"]}; {versions}.
"""
