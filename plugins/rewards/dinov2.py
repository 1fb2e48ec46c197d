"""DINOv2: timm's vision transformers without labels, as a likeness to reference images or a plain embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm.core import Condition, ConfigError, RewardOutput, RewardRecord, WeightsError, resolve_source

from ..checkpoints import differing, find_weights, load_strictly, read_json, read_weights
from .conditions import only
from .preprocessing import Preprocessing
from .timm_tower import TimmTower

CONFIG_FILE = "config.json"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_FEATURES = {"num_classes": 0, "global_pool": "token", "crop_pct": 1.0, "crop_mode": "center"}
"""What a checkpoint must be beside its architecture: no classifier, and a transform without a margin."""


class Dinov2Reward(TimmTower):
    """A :class:`TimmTower` whose score is its likeness to one or several reference images.

    The score is the mean cosine similarity of the image's embedding (the CLS token after the last norm) with those of
    the references, in [-1, 1]. Whoever needs the embedding alone takes it from ``judge`` and no score.
    """

    condition_kind = "images"

    @torch.no_grad()
    def encode_references(self, images: Sequence[Tensor] | Tensor) -> Condition:
        """``{"references": [1, R, D]}``: normalised embeddings of one sample's references, without gradient.

        ``images`` are ``R`` of ``[3, H, W]`` in [0, 1], of any sizes. One sample's condition serves a whole batch;
        ``concatenate`` joins those of samples with as many references each. Raises :class:`ConfigError` for no image or
        something else, and for a tail, which cannot read pixels.
        """
        if self.net.patch_embed is None:
            raise ConfigError("this part of a DINOv2 cannot read images; encode references with the whole reward.")
        given = list(images)
        if not given or not all(isinstance(image, Tensor) and image.ndim == 3 for image in given):
            raise ConfigError("references are one or more images [3, height, width] in [0, 1] of one sample.")
        pixels = torch.cat([self.preprocess(image[None].to(self.device).clamp(0, 1)) for image in given])
        embedding = self.resume(self.head(pixels, None, 0), 0).embedding
        return Condition({"references": F.normalize(embedding, dim=-1)[None]})

    def condition(self, prompts: Sequence[str] | Sequence[Tensor] | Condition | None) -> Condition:
        """What ``score`` needs, from reference images (one sample's) or from a ready condition.

        Raises :class:`ConfigError` for none, and for prompts, which it does not read.
        """
        if prompts is None or isinstance(prompts, Condition):
            return super().condition(prompts)
        if any(isinstance(item, str) for item in prompts):
            return self.encode_prompts([str(item) for item in prompts])
        return self.encode_references([item for item in prompts if isinstance(item, Tensor)])

    def encode_prompts(self, prompts: list[str]) -> Condition:
        raise ConfigError(
            "a DINOv2 reward compares with reference images, not with prompts; use encode_references(images)."
        )

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        """``[B]``: mean cosine similarity with the references ``[B, R, D]``."""
        image = F.normalize(output.embedding, dim=-1)
        references = only(condition, "references", self).to(image.dtype)
        return (image[:, None] * references).sum(-1).mean(1)

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """A frozen tower with random weights from torch's generator, or without any on the meta device.

        ``architecture`` names timm's ``model`` (without a tag) and repeats or changes its arguments (``img_size``,
        ``patch_size``, ``embed_dim``, ``depth``, ...); ``preprocess_cfg`` is open_clip's, ImageNet's statistics unless
        it says otherwise. Raises :class:`ConfigError` for an unknown model or argument.
        """
        with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
            net = _make_model(architecture)
        return cls._assemble(net.to(device), architecture)

    @classmethod
    def from_pretrained(
        cls,
        record: RewardRecord,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The tower of a folder or hub repository in timm's layout, or of one file; frozen.

        Without a ``config.json`` beside the weights the architecture is the record's. Raises :class:`WeightsError` for
        weights that are missing, truncated, or of another architecture or image size: timm itself would resample the
        positions.
        """
        fetch = partial(resolve_source, record, token=token, local_files_only=local_files_only)
        names = (record.filename,) if record.filename else _WEIGHT_FILES
        place = fetch(patterns=(CONFIG_FILE, names[0]))
        folder = place if place.is_dir() else place.parent
        architecture = _folder_architecture(folder / CONFIG_FILE, record)
        weights = find_weights(fetch, names)
        with torch.random.fork_rng(devices=[]):
            net = _make_model(architecture)
        load_strictly(net, read_weights(weights), weights)
        return cls._assemble(net.to(device, dtype or torch.float32), architecture)

    @classmethod
    def _assemble(cls, net: Any, architecture: Mapping[str, Any]) -> Self:
        config = _IMAGENET | architecture.get("preprocess_cfg", {})
        transform = Preprocessing.from_config(net.patch_embed.img_size[0], config)
        return cls(net.requires_grad_(False), transform).eval()


def _make_model(architecture: Mapping[str, Any]) -> Any:
    """A timm model with random weights on the default device."""
    args = {name: value for name, value in architecture.items() if name not in ("model", "preprocess_cfg")}
    if "model" not in architecture:
        raise ConfigError("a DINOv2's architecture names timm's 'model', for example 'vit_large_patch14_dinov2'.")
    try:
        return timm.create_model(architecture["model"], **{"num_classes": 0, **args})
    except (TypeError, RuntimeError) as error:  # RuntimeError: a name that timm does not know
        raise ConfigError(f"timm cannot make {architecture['model']!r}: {error}.") from error


def _folder_architecture(file: Path, record: RewardRecord) -> dict[str, Any]:
    """The folder's model configuration, or else the record's; :class:`WeightsError` where the two disagree."""
    if not file.is_file() and record.architecture:
        return dict(record.architecture)
    config = read_json(file)
    pretrained = config.get("pretrained_cfg")
    if not isinstance(pretrained, Mapping) or "architecture" not in config:
        raise WeightsError(f"{file} names no timm model; expected a folder saved in timm's layout.")
    statistics = {name: list(pretrained[name]) for name in ("mean", "std") if name in pretrained}
    preprocess = {**statistics, "interpolation": pretrained.get("interpolation", "bicubic")}
    found = {
        **config.get("model_args", {}),
        "model": config["architecture"],
        "img_size": pretrained.get("input_size", [3, 224, 224])[-1],
    }
    ours = {**_FEATURES, **_IMAGENET, **record.architecture, **record.architecture.get("preprocess_cfg", {})}
    named = {name: pretrained[name] for name in _FEATURES if name in pretrained}
    named |= {name: config[name] for name in ("num_classes", "global_pool") if name in config}
    if conflict := differing(ours, {**found, **preprocess, **named}):
        raise WeightsError(f"{file} is of another architecture than {record.name!r}: {conflict}. Correct the name.")
    return {**record.architecture, **found, "preprocess_cfg": preprocess}
