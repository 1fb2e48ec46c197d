"""The model card: what was trained, for how long, and how good it is, as measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import textwrap
from typing import Any

import torch

from ..constants import GUIDANCE, MAX_SEQUENCE_LENGTH, SCHEDULER_SHIFT, STEPS
from ..preferences import TEMPERATURE
from ..scenes import MAX_TOKENS, vocabulary
from ..taste import FARTHEST, NEAREST, RATING_NOISE, SIZE_APPEAL, TERM_WEIGHTS, TEXTURE_APPEAL
from . import aesthetic, dino, flux, hps
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


def _descriptions() -> dict[str, str]:
    """What each model is and how it was trained, by the names of the trainings."""
    weights = ", ".join(f"{weight:g} {name}" for name, weight in TERM_WEIGHTS.items())
    textures = ", ".join(f"{name} {appeal:g}" for name, appeal in TEXTURE_APPEAL.items())
    none, one, more = SIZE_APPEAL
    layers = " - ".join(map(str, aesthetic.WIDTHS))
    return {
        "vae": """
  the autoencoder in each pipeline's folder (`shapes-mmdit/vae/`): diffusers `AutoencoderKL`, latents 8 x 16 x 16,
  shifted and scaled to mean 0 and deviation 1.""",
        "mmdit": f"""
  `shapes-mmdit/`: diffusers `StableDiffusion3Pipeline` (`SD3Transformer2DModel`, two CLIP text
  encoders, no T5). Load it with `dtype=torch.float32, text_encoder_3=None, tokenizer_3=None` and call it with
  `max_sequence_length={MAX_SEQUENCE_LENGTH}`: it was trained without place-holder tokens for T5. Scheduler
  shift {SCHEDULER_SHIFT}; recommended guidance scale {GUIDANCE}, {STEPS} Euler steps, 64 x 64 pixels. Flow matching on
  {LATENTS:,} scenes, with the empty prompt in one case of ten.""",
        "flux": f"""
  `shapes-flux/`: diffusers `FluxPipeline` (`FluxTransformer2DModel`, a CLIP and a T5 encoder),
  call it with `max_sequence_length={MAX_TOKENS}`. Its {len(flux.DOUBLE)} double blocks begin as blocks of
  `shapes-mmdit`, and it is
  distilled from that model's guided velocity at guidance {flux.SCALES[0]:g} to {flux.SCALES[1]:g}, which it reads as an
  input: `guidance_scale={GUIDANCE}` costs one pass a step, as FLUX.1 dev.""",
        "unet": f"""
  `shapes-unet/`: diffusers `StableDiffusionPipeline` (`UNet2DConditionModel`, variance preserving,
  epsilon; one CLIP encoder), trained on the noise that `shapes-mmdit` finds in the same latents. DDIM, {STEPS} steps,
  guidance
  {GUIDANCE}. Its VAE is the same without the shift of latents, which that pipeline does not know.""",
        "clip": '`shapes-clip/`: open_clip model, `open_clip.create_model_from_pretrained("local-dir:...")`.',
        "hps": f"""
  `shapes-hps/`: open_clip model, `shapes-clip` finetuned on choices between two pictures of one
  prompt, by the cross-entropy of the preferred one under the softmax of the two cosines at a scale of
  {hps.PREFERENCE_SCALE:g}, and of each picture's own caption. The pairs are made by `stitchvm_shapes.preferences`: a
  hidden utility (wrong attributes, then fog, blur, grain, balance, look), and simulated people's choices after Bradley
  and Terry at temperature {TEMPERATURE:g}.""",
        "aesthetic": f"""
  `shapes-clip/{aesthetic.FILENAME}`: linear maps {layers} of `shapes-clip`'s unit image
  embedding to a rating from 1 to 10, fitted to {aesthetic.RATED:,} ratings with noise of deviation {RATING_NOISE:g}.
  The noiseless
  rating is 1 + 9 ({weights}), each term in 0 .. 1
  (`stitchvm_shapes.taste`): warmth, red minus blue of the objects' colours from the coldest to the warmest; contrast,
  their distance from the background in RGB from {NEAREST:g} to {FARTHEST:g}; texture, {textures};
  harmony, (1 + cos h) / 2 over pairs of objects with hues h apart, 0.5 for an object alone; size,
  {none:g}, {one:g}, {more:g} for no, one, more large objects.""",
        "dino": """
  `shapes-dino/`: timm vision transformer (`timm.create_model("local-dir:...", pretrained=True)`),
  trained without captions, by contrast (two pictures of one scene are alike, pictures of others are not, among them the
  same scene with one thing changed) and by distillation of `shapes-clip`'s image embedding.""",
        "detector": """
  `detector.safetensors`: says whether a picture fulfils a caption
  (`stitchvm_shapes.detector.Detector`).""",
    }


#: What the figures of a model mean, where their names do not say it.
_LEGENDS = {
    "hps": """
`accuracy` is how often the picture of higher utility is preferred, `accuracy_fulfilled` and
`accuracy_quality` the same for pairs with different and with equal numbers of wrong attributes, `accuracy_noisy`
agreement with noisy choices and `labels` how often these agree with the utility; `clip_*` the same of
`shapes-clip`.""",
    "aesthetic": """
`spearman` with the noiseless formula, `spearman_noisy` with noisy ratings, `spearman_raters` of the
formula with those, `error` the root mean square in points.""",
    "dino": f"""
`probe_*` is how often a linear classifier of embeddings, fitted to {dino.GALLERY:,} training scenes, is right (`colour`
and `shape`: in scenes of one object), `chance_*` the same for always naming the commonest; `mean_cosine` of different
scenes; `effective_rank` of at most 128; `tells_shapes` is how often another picture of a scene is more alike than one
with another shape in an object's place, `clip_tells_shapes` the same of `shapes-clip`.""",
}


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _text(record: dict[str, Any]) -> str:
    models = record["models"]
    listed = "\n".join(_filled(f"- {text}", "  ") for name, text in _descriptions().items() if name in models)
    legends = "\n\n".join(_filled(f"{name}: {text}") for name, text in _LEGENDS.items() if name in models)
    sections = "\n\n".join(f"### {name}\n\n{_table(numbers)}" for name, numbers in models.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""# The models of stitchvm-shapes

Small but real models of captioned 64 x 64 scenes, all trained from nothing by `python -m stitchvm_shapes.train`.
Weights are float16 safetensors under Apache-2.0. The training data is drawn by this package, so no third party's
pictures are in it.

{listed}

Captions have a vocabulary of {len(vocabulary())} words and a fixed grammar; other sentences mean nothing to these
models. One caption in ten, chosen by a hash of its text, is held out from every training; all figures below are for
held-out captions.

## Measured

{sections}

`minutes` is the time spent in the training loop, on two processor cores shared with other work. `train_*` are means
over 100 steps near the end. `fulfilled` is the part of generated pictures in which the detector finds the whole
caption, `fulfilled_n` the same for captions of n objects.

{legends}

Seed {record["seed"]}; {versions}.
"""
