"""The model card: what was trained, for how long, and how good it is, as measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import torch

from ..constants import GUIDANCE, MAX_SEQUENCE_LENGTH, SCHEDULER_SHIFT, STEPS
from ..scenes import vocabulary
from .stages import LATENTS, Plan

_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")


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
