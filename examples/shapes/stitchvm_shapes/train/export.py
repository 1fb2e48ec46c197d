"""Writing the trained models as the folders that diffusers, open_clip and the detector load; weights in float16."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from . import clip, mmdit
from .tokens import build_tokenizer


def replace_folder(folder: Path, partial: Path) -> None:
    """Put the finished folder `partial` in the place of `folder`."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _partial(folder: Path) -> Path:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.half().contiguous() for key, value in module.state_dict().items()}


def export_vae(vae: AutoencoderKL, folder: Path) -> None:
    """A diffusers `AutoencoderKL` folder."""
    partial = _partial(folder)
    copy.deepcopy(vae).half().save_pretrained(partial)
    replace_folder(folder, partial)


def _forget_origin(config: Path) -> None:
    """Take out of a model's configuration from which folder of this machine it was loaded."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def export_mmdit(vae: AutoencoderKL, modules: dict[str, nn.Module], folder: Path) -> None:
    """A diffusers `StableDiffusion3Pipeline` folder."""
    partial = _partial(folder)
    half = {name: copy.deepcopy(module).half() for name, module in modules.items()}
    pipe = mmdit.pipeline(
        copy.deepcopy(vae).half(), half["transformer"], [half["text_encoder_0"], half["text_encoder_1"]]
    )
    pipe.save_pretrained(partial)
    _forget_origin(partial / "vae" / "config.json")
    replace_folder(folder, partial)


def export_clip(model: nn.Module, folder: Path) -> None:
    """A folder for `open_clip.create_model_from_pretrained("local-dir:...")`."""
    partial = _partial(folder)
    save_file(_state(model), partial / "open_clip_model.safetensors")
    settings = {
        "model_cfg": clip.config(),
        "preprocess_cfg": {"mean": clip.MEAN, "std": clip.STD, "interpolation": "bicubic"},
    }
    (partial / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    build_tokenizer().save_pretrained(partial)
    replace_folder(folder, partial)


def export_detector(net: nn.Module, path: Path) -> None:
    """The detector's weights in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_state(net), path)
