"""LAION's aesthetic predictor, version 2: a small network over OpenAI's CLIP ViT-L/14, which reads no prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitchvm.core import Condition, ConfigError, RewardOutput, RewardRecord, WeightsError, resolve_source

from ..checkpoints import load_strictly, read_weights
from .clip import ClipReward
from .conditions import none
from .openclip import TextTower
from .token_tower import Transform


class _FrozenLinear(nn.Module):
    """A linear map whose tensors are buffers: the paper keeps the predictor frozen while the tower is finetuned."""

    weight: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Predictor(nn.Module):
    """Score ``[B]`` (about 1 to 10) from a CLIP embedding ``[B, D]``: linear maps of its direction, in float32.

    There are no activations between them: the published weights were trained without. Where the authors have dropout,
    after all but the last two, nothing happens: it acts in training alone, and here they are never trained.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            layers.append(_FrozenLinear(inputs, outputs))
            if number < len(widths) - 3:
                layers.append(nn.Identity())
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: Tensor) -> Tensor:
        score: Tensor = self.layers(F.normalize(embedding.float(), dim=-1))
        return score.squeeze(-1)


class AestheticReward(ClipReward):
    """A :class:`ClipReward` that ends in a :class:`Predictor`; ``score`` is in its output and needs no condition.

    An architecture is that of the CLIP and a table ``predictor``: ``widths`` (of the embedding and every layer's
    output) and the ``filename`` of its weights, which lies beside the CLIP's in a folder or else in the hub's ``repo``;
    with ``sha256`` the file must be exactly that one.
    """

    condition_kind = "nothing"

    def __init__(self, visual: nn.Module, transform: Transform, text: TextTower | None = None) -> None:
        super().__init__(visual, transform)  # the text tower is let go: nothing here reads it

    @property
    def exit_modules(self) -> tuple[str, ...]:
        return (*super().exit_modules, "predictor")

    def exit(self, state: Tensor) -> RewardOutput:
        output = super().exit(state)
        return attrs.evolve(output, score=self.net.predictor(output.embedding))

    def encode_prompts(self, prompts: list[str]) -> Condition:
        raise ConfigError("the aesthetic predictor scores images alone; there are no prompts to encode.")

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        """``[B]``: the score the tower ended in; :class:`ConfigError` for a surplus condition."""
        none(condition, self)
        assert output.score is not None
        return output.score

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Self:
        """As a CLIP's, with the table ``predictor``."""
        clip, table = _split(architecture)
        reward = super().build(clip, device=device)
        with torch.device(device):
            reward.net.predictor = Predictor(table["widths"])
        return reward.eval()

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
        """As a CLIP's; the predictor stays in float32, and is read from the ``.pth`` its authors published.

        Raises :class:`WeightsError` when either part is missing, damaged or of another architecture.
        """
        clip, table = _split(record.architecture)
        settings: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
        file = _predictor_file(record, table, **settings)  # 4 MB: first, before the tower is read for nothing
        with torch.device("meta"):
            predictor = Predictor(table["widths"])
        _check_digest(file, table.get("sha256"))
        load_strictly(predictor, read_weights(file), file)
        reward = super().from_pretrained(
            attrs.evolve(record, architecture=clip), dtype=dtype, device=device, **settings
        )
        reward.net.predictor = predictor.to(device).float()
        return reward.eval()


def _split(architecture: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The CLIP's settings and the predictor's; :class:`ConfigError` unless they fit each other."""
    clip = dict(architecture)
    table = clip.pop("predictor", None)
    if not isinstance(table, Mapping) or not {"widths", "filename"} <= set(table):
        raise ConfigError("an aesthetic reward's architecture needs a table 'predictor' with 'widths' and 'filename'.")
    widths = table["widths"]
    if len(widths) < 2 or widths[0] != clip.get("embed_dim") or widths[-1] != 1:
        raise ConfigError(
            f"predictor.widths is {widths}; it must begin with the CLIP's embed_dim ({clip.get('embed_dim')}) and end "
            "with 1."
        )
    return clip, dict(table)


def _predictor_file(record: RewardRecord, table: Mapping[str, Any], **settings: Any) -> Path:
    """Where the predictor's weights are: beside the CLIP's, or in a hub repository of their own."""
    name = table["filename"]
    if record.path is None:
        if "repo" not in table:
            raise WeightsError(f"{record.name!r}: the predictor's weights {name!r} have no 'repo'; pass a folder.")
        source = attrs.evolve(record, repo=table["repo"], revision=table.get("revision"), filename=name)
        return resolve_source(source, **settings)
    place = Path(record.path)
    folder = place.parent if place.is_file() else place
    resolve_source(attrs.evolve(record, path=str(folder), filename=name))
    return folder / name


def _check_digest(file: Path, wanted: str | None) -> None:
    """:class:`WeightsError` for another file than the authors': widths alone would not tell it from a retrained one."""
    if wanted is None:
        return
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wanted:
        raise WeightsError(
            f"{file} is not the file that was published (sha256 {found[:12]}.., expected {wanted[:12]}..); it is "
            "truncated or another predictor. Download it again."
        )
