"""What open_clip's models share as rewards: the text tower, the score, and reading the checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import attrs
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from stitchvm.core import (
    Condition,
    ConfigError,
    Reward,
    RewardOutput,
    RewardRecord,
    WeightsError,
    resolve_source,
)

from ..checkpoints import differing, find_weights, load_strictly, read_json, read_weights
from . import transformers_clip
from .conditions import only
from .preprocessing import Preprocessing
from .token_tower import Transform

CONFIG_FILE = "open_clip_config.json"
_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Where open_clip's layout keeps the weights, in order of preference."""

_OWN_SETTINGS = ("preprocess_cfg", "custom_text", "score", "timm_args")
"""What an architecture may say beside open_clip's own model settings."""


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


class OpenClipReward(Reward):
    """A :class:`Reward` over the image tower of an open_clip model; its score is a cosine similarity with the prompt.

    The score lies in [-1, 1], or in that range times ``score_scale``. ``companions`` is the :class:`TextTower`. A
    family below it writes the slicing of one kind of tower, takes ``(visual, transform, text)`` and says in
    ``check_tower`` which towers fit.
    """

    companions: TextTower | None
    condition_kind: Literal["prompts", "nothing"] = "prompts"
    score_scale: float = 1.0

    @classmethod
    def check_tower(cls, visual: nn.Module) -> int:
        """The side of the images a tower reads; :class:`SliceError` for one whose forward pass is not written here."""
        raise NotImplementedError

    @classmethod
    def make_model(cls, architecture: Mapping[str, Any]) -> Any:
        """An open_clip model with random weights on the default device."""
        settings = {name: value for name, value in architecture.items() if name not in _OWN_SETTINGS}
        try:
            if CLIPTextCfg(**settings["text_cfg"]).hf_model_name:
                raise ConfigError(f"{cls.__name__} builds open_clip's own text towers, not one of hf_model_name.")
            kind = open_clip.CustomTextCLIP if architecture.get("custom_text") else open_clip.CLIP
            return kind(**settings)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"not an open_clip model configuration: {error}.") from error

    @classmethod
    def make_transform(cls, size: int, config: Mapping[str, Any]) -> Transform:
        """The preprocessing that an architecture's ``preprocess_cfg`` describes, for images of ``size`` pixels."""
        return Preprocessing.from_config(size, config)

    # -- text and score -----------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """``{"text": [B, D]}``: L2-normalised text embeddings, without gradient.

        Raises :class:`ConfigError` for anything but a list of strings, and for a tail, which has no text tower.
        """
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(f"encode_prompts takes a list of at least one prompt, got {str(prompts)[:80]}.")
        if self.companions is None:
            raise ConfigError("this part of a CLIP has no text tower; encode the prompts with the whole reward.")
        return Condition({"text": self.companions(list(prompts), self.device)})

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        """``[B]``: cosine similarity of image and text embedding, times ``score_scale``."""
        image = F.normalize(output.embedding, dim=-1)
        text = only(condition, "text", self)
        return self.score_scale * (image * text.to(image.dtype)).sum(-1)

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """A frozen reward with random weights from torch's generator, or without any on the meta device.

        ``architecture`` is an open_clip model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``,
        ``quick_gelu``, ...) with an optional ``preprocess_cfg`` and ``score``: ``"cosine"``, or ``"logit"`` for the
        cosine times the model's own temperature, ``exp(logit_scale)``. Raises :class:`ConfigError` for an unknown or
        missing setting and :class:`SliceError` for a tower of another kind.
        """
        with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
            model = cls.make_model(architecture)
        return cls._assemble(model, architecture, None, device, torch.float32)

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
        """The reward of a folder or hub repository in open_clip's or transformers' layout, or of one file; frozen.

        Without a configuration beside the weights the architecture is the record's. Raises :class:`WeightsError` for
        weights that are missing, truncated, or of another architecture, activation (quickgelu) or image size than the
        record's.
        """
        fetch = partial(resolve_source, record, token=token, local_files_only=local_files_only)
        place = fetch(patterns=("*.json", "*.txt", record.filename or _WEIGHT_FILES[0]))
        folder = place if place.is_dir() else place.parent
        architecture = _folder_architecture(folder, record)
        names = (record.filename,) if record.filename else _weight_files(folder)
        weights = find_weights(fetch, names)
        with torch.random.fork_rng(devices=[]):
            model = cls.make_model(architecture)
        tensors = read_weights(weights)
        if transformers_clip.is_clip_model(tensors):
            tensors = transformers_clip.to_open_clip(tensors, weights)
        load_strictly(model, tensors, weights)
        return cls._assemble(model, architecture, folder, device, dtype or torch.float32)

    @classmethod
    def _assemble(
        cls,
        model: Any,
        architecture: Mapping[str, Any],
        folder: Path | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Self:
        scale = _score_scale(model, architecture)  # before the precision is reduced
        model.to(device, dtype).requires_grad_(False).eval()
        text = copy.copy(model)  # shares the tensors, without the image tower
        text._modules = {name: child for name, child in model._modules.items() if name != "visual"}
        tower = TextTower(text, partial(_open_tokenizer, dict(architecture["text_cfg"]), folder))
        size = cls.check_tower(model.visual)
        transform = cls.make_transform(size, architecture.get("preprocess_cfg", {}))
        reward: Self = cls(model.visual, transform, tower)  # type: ignore[call-arg]
        reward.score_scale = scale
        return reward.eval()


def _score_scale(model: Any, architecture: Mapping[str, Any]) -> float:
    """What the cosine is multiplied with; 1 on the meta device, where there is no temperature to read."""
    kind = architecture.get("score", "cosine")
    if kind not in ("cosine", "logit"):
        raise ConfigError(f"score is {kind!r}; choose 'cosine' or 'logit' (the cosine times exp(logit_scale)).")
    return 1.0 if kind == "cosine" or model.logit_scale.is_meta else float(model.logit_scale.detach().exp())


def _folder_architecture(folder: Path, record: RewardRecord) -> dict[str, Any]:
    """The folder's model configuration, or else the record's; :class:`WeightsError` where the two disagree.

    What only the record says, such as part of the preprocessing, is filled in.
    """
    file = folder / CONFIG_FILE
    found = None if file.is_file() else transformers_clip.read_architecture(folder)
    if found is None:
        if not file.is_file() and record.architecture:
            return dict(record.architecture)
        config = read_json(file)
        if "model_cfg" not in config:
            raise WeightsError(f"{file} has no model_cfg; expected a folder saved in open_clip's layout.")
        found = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}
    if conflict := differing(_stated(record.architecture), _complete(found)):
        place = file if file.is_file() else folder
        raise WeightsError(
            f"{place} is of another architecture than {record.name!r}: {conflict}. Correct the name or path."
        )
    own = {name: record.architecture[name] for name in _OWN_SETTINGS if name in record.architecture}
    preprocess = {**own.get("preprocess_cfg", {}), **found["preprocess_cfg"]}
    return {**own, **found, "preprocess_cfg": preprocess}


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


def _weight_files(folder: Path) -> tuple[str, ...]:
    """Where the weights may be: open_clip's names, and transformers' where the folder is not open_clip's."""
    return _WEIGHT_FILES if (folder / CONFIG_FILE).is_file() else (*_WEIGHT_FILES, *transformers_clip.WEIGHT_FILES)


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
