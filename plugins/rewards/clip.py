"""CLIP: open_clip's ``VisionTransformer`` cut after any of its blocks, scored against the text tower's embedding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import attrs
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from stitchvm.core import (
    Condition,
    ConfigError,
    Reward,
    RewardOutput,
    RewardRecord,
    SliceError,
    WeightsError,
    resolve_source,
)

from ..checkpoints import differing, load_strictly, read_json, read_tensors
from .preprocessing import Preprocessing

CONFIG_FILE = "open_clip_config.json"
_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Where open_clip's layout keeps the weights, in order of preference."""


@attrs.define(eq=False)
class TextTower:
    """The text side: ``model.encode_text`` and a tokenizer, which is opened on first use."""

    model: nn.Module
    open_tokenizer: Callable[[], Any]
    _tokenizer: Any = attrs.field(default=None, init=False)

    @torch.no_grad()
    def __call__(self, prompts: list[str], device: torch.device) -> Tensor:
        """``[B, D]`` L2-normalised text embeddings."""
        if self._tokenizer is None:
            self._tokenizer = self.open_tokenizer()
        tokens = self._tokenizer(prompts).to(device)
        embedding: Tensor = self.model.to(device).encode_text(tokens, normalize=True)  # type: ignore[operator]
        return embedding


class ClipReward(Reward):
    """A :class:`Reward` over open_clip's ``VisionTransformer``; its score is the cosine similarity with the prompt.

    The score lies in [-1, 1]. The state is the tokens ``[B, 1 + grid_size^2, C]``, CLS first. ``companions`` is the
    :class:`TextTower`.
    """

    net: VisionTransformer
    companions: TextTower | None
    enter_modules = ("positional_embedding",)
    prefix_count = 1
    condition_kind = "prompts"

    def __init__(self, visual: nn.Module, preprocessing: Preprocessing, text: TextTower | None = None) -> None:
        tower = _supported(visual)
        super().__init__(tower)
        self.companions = text
        self.image_size = tower.image_size[0]
        self.grid_size = tower.grid_size[0]
        self._preprocessing = preprocessing
        self._layers = len(tower.transformer.resblocks)
        self._batch_first = tower.transformer.batch_first

    # -- slicing ------------------------------------------------------------------------------------------------------

    @property
    def stem_modules(self) -> tuple[str, ...]:
        return ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")

    @property
    def block_modules(self) -> tuple[str, ...]:
        return tuple(f"transformer.resblocks.{k}" for k in range(self._layers))

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return ("ln_post", "proj")

    def stem(self, x: Tensor, condition: object = None) -> Tensor:
        """Patches behind the CLS token, with positions, normalised."""
        if x.shape[1:] != (3, self.image_size, self.image_size):
            raise SliceError(
                f"this CLIP reads pixels [batch, 3, {self.image_size}, {self.image_size}], got {list(x.shape)}; "
                "preprocess the images first."
            )
        net = self.net
        patches = net.conv1(x.to(self.dtype)).flatten(2).transpose(1, 2)
        cls = net.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + net.positional_embedding.to(patches.dtype)
        return net.ln_pre(net.patch_dropout(tokens))

    def block(self, k: int, state: Tensor) -> Tensor:
        block = self.net.transformer.resblocks[k - 1]
        if self._batch_first:
            return block(state)
        return block(state.transpose(0, 1).contiguous()).transpose(0, 1)

    def exit(self, state: Tensor) -> RewardOutput:
        """All tokens after ``ln_post``, and the pooled, projected embedding that ``visual`` returns."""
        net = self.net
        tokens = net.ln_post(state)
        pooled = self._pool(state if net.final_ln_after_pool else tokens)
        if net.final_ln_after_pool:
            pooled = net.ln_post(pooled)
        return RewardOutput(tokens, pooled if net.proj is None else pooled @ net.proj)

    def _pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.net.pool_type == "tok" else tokens[:, 1:].mean(dim=1)

    def grid(self, state: Tensor) -> Tensor:
        return state[:, 1:].transpose(1, 2).reshape(len(state), -1, self.grid_size, self.grid_size)

    def prefix(self, state: Tensor) -> Tensor:
        return state[:, :1]

    def enter(self, grid: Tensor, prefix: Tensor, *, positions: bool = False) -> Tensor:
        self.check_grid(grid)
        cls = prefix.to(grid.dtype).expand(len(grid), -1, -1)
        tokens = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.net.positional_embedding.to(tokens.dtype) if positions else tokens

    def example(self, batch: int = 1) -> tuple[Tensor, None]:
        return torch.zeros(batch, 3, self.image_size, self.image_size, device=self.device), None

    def preprocess(self, images: Tensor) -> Tensor:
        return self._preprocessing(images)

    # -- text and score -----------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """``{"text": [B, D]}``: L2-normalised text embeddings, without gradient.

        Raises :class:`ConfigError` for an empty list or a bare string, and for a tail, which has no text tower.
        """
        if not isinstance(prompts, list) or not prompts:
            raise ConfigError(f"encode_prompts takes a list of at least one prompt, got {prompts!r}.")
        if self.companions is None:
            raise ConfigError("this part of a CLIP has no text tower; encode the prompts with the whole reward.")
        return Condition({"text": self.companions(list(prompts), self.device)})

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        """``[B]``: cosine similarity of image and text embedding."""
        image = F.normalize(output.embedding, dim=-1)
        return (image * condition["text"].to(image.dtype)).sum(-1)

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """A frozen CLIP with random weights from torch's generator, or without any on the meta device.

        ``architecture`` is an open_clip model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``,
        ``quick_gelu``, ...) with an optional ``preprocess_cfg``. Raises :class:`ConfigError` for an unknown or missing
        setting and :class:`SliceError` for a tower that is not a plain vision transformer.
        """
        with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
            model = _make_model(architecture)
        return cls._assemble(model.to(device), architecture, None)

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
        """The CLIP of a folder or hub repository in open_clip's layout, or of one checkpoint file; frozen.

        Without an ``open_clip_config.json`` beside the weights the architecture is the record's. Raises
        :class:`WeightsError` for weights that are missing, truncated, or of another architecture, activation
        (quickgelu) or image size than the record's.
        """
        fetch = partial(resolve_source, record, token=token, local_files_only=local_files_only)
        names = (record.filename,) if record.filename else _WEIGHT_FILES
        place = fetch(patterns=("*.json", "*.txt", *names[:1]))
        folder = place if place.is_dir() else place.parent
        architecture, weights = _folder_architecture(folder, record), _weight_file(fetch, names)
        with torch.random.fork_rng(devices=[]):
            model = _make_model(architecture)
        load_strictly(model, _read_weights(weights), weights)
        model = model.to(device, dtype or torch.float32)
        return cls._assemble(model, architecture, folder)

    @classmethod
    def _assemble(cls, model: Any, architecture: Mapping[str, Any], folder: Path | None) -> Self:
        model.requires_grad_(False).eval()
        text = copy.copy(model)  # shares the tensors, without the image tower
        text._modules = {name: child for name, child in model._modules.items() if name != "visual"}
        tower = TextTower(text, partial(_open_tokenizer, dict(architecture["text_cfg"]), folder))
        size = _supported(model.visual).image_size[0]
        return cls(model.visual, Preprocessing.from_config(size, architecture.get("preprocess_cfg", {})), tower).eval()


def _supported(visual: nn.Module) -> VisionTransformer:
    """The tower itself; :class:`SliceError` for one whose forward pass ``ClipReward`` does not write out."""
    if not isinstance(visual, VisionTransformer):
        raise SliceError(
            f"ClipReward slices open_clip's VisionTransformer, not {type(visual).__name__}; "
            "timm and ResNet towers need a family of their own."
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise SliceError("ClipReward reads towers that pool by CLS token or average, not by attention or not at all.")
    if visual.grid_size[0] != visual.grid_size[1] or visual.image_size[0] != visual.image_size[1]:
        raise SliceError(f"ClipReward reads square images, this tower takes {visual.image_size}.")
    return visual


def _make_model(architecture: Mapping[str, Any]) -> Any:
    """An open_clip model with random weights on the default device."""
    settings = {name: value for name, value in architecture.items() if name not in ("preprocess_cfg", "custom_text")}
    try:
        if CLIPTextCfg(**settings["text_cfg"]).hf_model_name:
            raise ConfigError(
                "ClipReward builds open_clip's own text towers, not one from transformers (hf_model_name)."
            )
        kind = open_clip.CustomTextCLIP if architecture.get("custom_text") else open_clip.CLIP
        return kind(**settings)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"not an open_clip model configuration: {error}.") from error


def _folder_architecture(folder: Path, record: RewardRecord) -> dict[str, Any]:
    """The folder's model configuration, or else the record's; :class:`WeightsError` where the two disagree."""
    file = folder / CONFIG_FILE
    if not file.is_file() and record.architecture:
        return dict(record.architecture)
    config = read_json(file)
    if "model_cfg" not in config:
        raise WeightsError(f"{file} has no model_cfg; expected a folder saved in open_clip's layout.")
    architecture = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}
    if conflict := differing(_stated(record.architecture), _complete(architecture)):
        raise WeightsError(
            f"{file} is of another architecture than {record.name!r}: {conflict}. Correct the name or path."
        )
    return architecture


def _stated(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says, flat. Leaving ``quick_gelu`` out says False: the wrong activation fits the same weights."""
    groups = {name: value for name, value in architecture.items() if isinstance(value, Mapping)}
    flat = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    if architecture:
        flat |= {"quick_gelu": False} | {name: value for name, value in architecture.items() if name not in groups}
    return flat


def _complete(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's configuration, flat, with open_clip's defaults filled in."""
    try:
        vision, text = CLIPVisionCfg(**architecture["vision_cfg"]), CLIPTextCfg(**architecture["text_cfg"])
    except (TypeError, KeyError) as error:
        raise ConfigError(f"not an open_clip model configuration: {error}.") from error
    whole = {
        **architecture,
        "vision_cfg": vars(vision),
        "text_cfg": vars(text),
        "preprocess_cfg": {"size": vision.image_size, **architecture["preprocess_cfg"]},
    }
    return _stated(whole)


def _weight_file(fetch: Callable[..., Path], names: tuple[str, ...]) -> Path:
    """The checkpoint a record points at, else the first of ``names`` in its folder or hub repository."""
    for name in names:
        place = fetch(patterns=(name,))
        file = place / name if place.is_dir() else place
        if file.is_file():
            return file
    raise WeightsError(f"{place} holds none of {', '.join(names)}; name the checkpoint file in the record (filename).")


def _read_weights(file: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors; nothing in it is executed."""
    if file.suffix == ".safetensors":
        return read_tensors([file])
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to lead to
        raise WeightsError(
            f"{file} cannot be read as plain tensors ({error}); it is damaged, or a format that runs code when read "
            "(convert it to safetensors)."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{file} is not a state dict; convert it to safetensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _open_tokenizer(text_cfg: Mapping[str, Any], folder: Path | None) -> Any:
    """The folder's tokenizer when it brings one, else open_clip's own, which ships with the package."""
    if not text_cfg.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(context_length=text_cfg.get("context_length", 77))
    if folder is None:
        raise WeightsError("this CLIP names a tokenizer of its own; load it from a folder that holds it.")
    try:
        return open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ValueError) as error:
        raise WeightsError(f"the tokenizer in {folder} cannot be read: {error}") from error
