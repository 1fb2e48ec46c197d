"""Reading safetensors strictly: the right tensors, all of them, or one error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stitchvm.core import WeightsError


def read_config(file: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that does not contradict ``expected``; :class:`WeightsError` for another, and for none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read ({error}); download it again.") from error
    differ = [f"{name} is {config[name]}, expected {value}" for name, value in expected.items()
              if name in config and config[name] != value]  # fmt: skip
    if differ:
        raise WeightsError(f"{file} is of another architecture than its record's: {'; '.join(differ)}.")
    return dict(config)


def files_of(folder: Path, stem: str, prefixes: tuple[str, ...] | None) -> list[Path]:
    """The safetensors files of ``stem`` in ``folder`` that hold tensors below ``prefixes`` (all when None)."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    homes = read_config(index, {})["weight_map"]
    return sorted({folder / home for name, home in homes.items() if _below(name, prefixes)})


def load(
    module: nn.Module,
    files: Iterable[Path],
    *,
    prefixes: tuple[str, ...] | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Put the files' tensors below ``prefixes`` in place of the module's own, frozen.

    Raises :class:`WeightsError` for a missing or damaged file, and unless they are exactly the module's.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if _below(name, prefixes):
                        tensors[name] = handle.get_tensor(name).to(device, dtype)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is missing or damaged ({error}); download it again.") from error
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"the tensors in {file.parent} are not those of its architecture: {error}") from error
    module.requires_grad_(False)


def _below(name: str, prefixes: tuple[str, ...] | None) -> bool:
    return prefixes is None or any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
