"""A CLIP in transformers' layout (``CLIPModel``) as open_clip's: the same network under other names.

The layout is ``config.json`` and ``model.safetensors``; PickScore is published in it. Attention's three projections
lie side by side in open_clip, and the two last projections are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitchvm.core import WeightsError

from ..checkpoints import read_json

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What a configuration that leaves a setting of the image tower out means (``CLIPVisionConfig``)."""

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""The same of the text tower (``CLIPTextConfig``)."""

PROJECTION_DEFAULT = 512

_TOWERS = {"vision_model.": "visual.", "text_model.": ""}
_MODULES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.token_embedding": "token_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def is_clip_model(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint's names are those of transformers' ``CLIPModel``."""
    return any(name.startswith("vision_model.") for name in tensors)


def to_open_clip(tensors: Mapping[str, Tensor], origin: Path | str) -> dict[str, Tensor]:
    """The tensors under open_clip's names; :class:`WeightsError` for one that a ``CLIPModel`` does not have."""
    found: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):  # a count from 0, which older versions saved
            continue
        if name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif ".self_attn." in name and ".out_proj." not in name:
            layer, _, rest = name.partition(".self_attn.")
            part, _, kind = rest.partition("_proj.")
            attention.setdefault(f"{layer}.self_attn.{kind}", {})[part] = tensor
        else:
            found[_renamed(name, origin)] = tensor
    for name, parts in attention.items():
        if set(parts) != {"q", "k", "v"}:
            raise WeightsError(f"{origin}: {name} has only the projections {', '.join(sorted(parts))} of q, k and v.")
        layer, _, kind = name.partition(".self_attn.")
        home = _layer(layer, origin)
        found[f"{home}.attn.in_proj_{kind}"] = torch.cat([parts[part] for part in "qkv"])
    return found


def _renamed(name: str, origin: Path | str) -> str:
    """One tensor's open_clip name."""
    if name == "logit_scale":
        return name
    for prefix, tower in _TOWERS.items():
        rest = name.removeprefix(prefix)
        if rest == name:
            continue
        if rest == "embeddings.position_embedding.weight":
            return f"{tower}positional_embedding"
        for theirs, ours in _MODULES.items():
            if rest == theirs or rest.startswith(theirs + "."):
                return tower + ours + rest.removeprefix(theirs)
        head, _, tail = rest.removeprefix("encoder.layers.").partition(".")
        for theirs, ours in _LAYER.items():
            if tail.startswith(theirs + "."):
                return f"{_layer(f'{prefix}encoder.layers.{head}', origin)}.{ours}{tail.removeprefix(theirs)}"
    raise WeightsError(f"{origin} holds {name!r}, which a CLIPModel of transformers does not have.")


def _layer(name: str, origin: Path | str) -> str:
    """The block that holds a layer of either tower."""
    for prefix, tower in _TOWERS.items():
        number = name.removeprefix(f"{prefix}encoder.layers.")
        if number.isdigit():
            return f"{tower}transformer.resblocks.{number}"
    raise WeightsError(f"{origin} holds {name!r}, which is no layer of a CLIPModel of transformers.")


def read_architecture(folder: Path) -> dict[str, Any] | None:
    """open_clip's configuration of a folder that transformers' ``CLIPModel`` wrote; None for any other folder.

    Raises :class:`WeightsError` for settings that open_clip's CLIP has no counterpart of.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if config.get("model_type") != "clip":
        return None
    vision = VISION_DEFAULTS | _table(config, "vision_config")
    text = TEXT_DEFAULTS | _table(config, "text_config")
    if vision["hidden_act"] != text["hidden_act"] or vision["hidden_act"] not in ("gelu", "quick_gelu"):
        raise WeightsError(
            f"{file}: the towers' activations are {vision['hidden_act']!r} and {text['hidden_act']!r}, expected both "
            "'gelu' or both 'quick_gelu'."
        )
    if text["vocab_size"] != TEXT_DEFAULTS["vocab_size"]:
        raise WeightsError(
            f"{file}: a vocabulary of {text['vocab_size']}, expected CLIP's {TEXT_DEFAULTS['vocab_size']}; save a CLIP "
            "with a tokenizer of its own in open_clip's layout."
        )
    return {
        "embed_dim": config.get("projection_dim", PROJECTION_DEFAULT),
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_sizes(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_sizes(text),
        },
        "preprocess_cfg": _preprocessing(folder / "preprocessor_config.json"),
    }


def _table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tower's settings; some old files have them only under ``..._dict``."""
    return dict(config.get(name) or config.get(f"{name}_dict") or {})


def _sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    width, epsilon = tower["hidden_size"], tower["layer_norm_eps"]
    sizes = {"width": width, "layers": tower["num_hidden_layers"], "mlp_ratio": tower["intermediate_size"] / width}
    return sizes if epsilon == 1e-5 else {**sizes, "norm_kwargs": {"eps": epsilon}}


def _preprocessing(file: Path) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` of ``CLIPImageProcessor``'s file, empty without one."""
    if not file.is_file():
        return {}
    config = read_json(file)
    steps = [name for name in ("do_resize", "do_center_crop", "do_normalize") if not config.get(name, True)]
    if steps:
        raise WeightsError(f"{file} switches {', '.join(steps)} off; expected CLIP's resize, crop and normalise.")
    found = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    found["interpolation"] = {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3))
    return {name: value for name, value in found.items() if value is not None} | {"resize_mode": "shortest"}
