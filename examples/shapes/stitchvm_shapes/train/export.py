"""Writing the trained models as the folders that diffusers, open_clip and the detector load; weights in float16."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from . import aesthetic, clip, dino, flux, mmdit, unet
from .loop import write_atomically
from .tokens import build_tokenizer

#: open_clip's name for the weights in a folder.
TOWER = "open_clip_model.safetensors"


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
    _save_pipeline(pipe, partial)
    replace_folder(folder, partial)


def _save_pipeline(pipe: DiffusionPipeline, partial: Path) -> None:
    pipe.save_pretrained(partial)
    _forget_origin(partial / "vae" / "config.json")


def export_flux(vae: AutoencoderKL, modules: dict[str, nn.Module], folder: Path) -> None:
    """A diffusers `FluxPipeline` folder."""
    partial = _partial(folder)
    half = {name: copy.deepcopy(module).half() for name, module in modules.items()}
    _save_pipeline(flux.pipeline(copy.deepcopy(vae).half(), half), partial)
    replace_folder(folder, partial)


def export_unet(vae: AutoencoderKL, modules: dict[str, nn.Module], folder: Path) -> None:
    """A diffusers `StableDiffusionPipeline` folder; that pipeline knows no shift of its latents."""
    partial = _partial(folder)
    half = {name: copy.deepcopy(module).half() for name, module in modules.items()}
    unshifted = copy.deepcopy(vae).half()
    unshifted.register_to_config(shift_factor=0.0)
    _save_pipeline(unet.pipeline(unshifted, half), partial)
    replace_folder(folder, partial)


def export_clip(model: nn.Module, folder: Path) -> None:
    """A folder for `open_clip.create_model_from_pretrained("local-dir:...")`."""
    partial = _partial(folder)
    save_file(_state(model), partial / TOWER)
    settings = {
        "model_cfg": clip.config(),
        "preprocess_cfg": {"mean": clip.MEAN, "std": clip.STD, "interpolation": "bicubic"},
    }
    (partial / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    build_tokenizer().save_pretrained(partial)
    replace_folder(folder, partial)


def export_aesthetic(net: nn.Module, folder: Path) -> None:
    """The predictor's weights beside the tower's they were fitted to, whose digest is in the file.

    `export_clip` replaces the whole folder, so a new tower never has an old predictor beside it.
    """
    digest = hashlib.sha256((folder / TOWER).read_bytes()).hexdigest()
    write_atomically(folder / aesthetic.FILENAME, lambda path: save_file(_state(net), path, {"tower_sha256": digest}))


def export_dino(tower: nn.Module, folder: Path) -> None:
    """A folder in timm's layout, for `timm.create_model("local-dir:...")`."""
    partial = _partial(folder)
    save_file(_state(tower), partial / "model.safetensors")
    settings = {
        "architecture": dino.ARCHITECTURE,
        "num_classes": 0,
        "num_features": dino.ARGUMENTS["embed_dim"],
        "global_pool": "token",
        "model_args": dino.ARGUMENTS,
        "pretrained_cfg": dino.PRETRAINED,
    }
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    replace_folder(folder, partial)


def export_detector(net: nn.Module, path: Path) -> None:
    """The detector's weights in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_state(net), path)
