"""Reading checkpoints strictly, for the built-in families: the right tensors, all of them, or one error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stitchvm.core import WeightsError

_SHOWN = 4


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; :class:`WeightsError` when it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; the checkpoint folder is incomplete, download it again.") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}, expected a JSON object.")
    return content


def shards(folder: Path, stem: str, prefixes: tuple[str, ...] | None = None) -> list[Path]:
    """The files of ``stem.safetensors`` in ``folder`` that hold tensors below ``prefixes`` (all when None)."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise WeightsError(f"{index} has no weight_map; download it again.")
    return sorted({folder / home for name, home in homes.items() if _below(name, prefixes)})


def read_tensors(
    files: Iterable[Path],
    *,
    prefixes: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors whose names are below ``prefixes`` (whole dotted parts; all when None), floating ones in ``dtype``.

    Nothing else is read from disk. Raises :class:`WeightsError` for a missing or truncated file.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} does not exist{_unsafe(file.parent)}; download the checkpoint again.")
        try:
            with safe_open(str(file), framework="pt", device="cpu") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if _below(name, prefixes):
                        tensor = handle.get_tensor(name)
                        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is truncated or damaged ({error}); download it again.") from error
    return tensors


def find_weights(fetch: Callable[..., Path], names: Sequence[str]) -> Path:
    """The first of the files ``names`` that ``fetch(patterns=...)`` brings: a folder to look in, or the file itself.

    Raises :class:`WeightsError` when there is none.
    """
    for name in names:
        place = fetch(patterns=(name,))
        file = place / name if place.is_dir() else place
        if file.is_file():
            return file
    raise WeightsError(f"{place} holds none of {', '.join(names)}; name the checkpoint file in the record (filename).")


def read_weights(file: Path) -> dict[str, Tensor]:
    """One checkpoint's tensors, from safetensors or from ``torch.save``; nothing in it is executed.

    A state dict may lie under ``state_dict``, as training loops write it, and its names below ``module.``. Raises
    :class:`WeightsError` for anything else.
    """
    if file.suffix == ".safetensors":
        return read_tensors([file])
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to lead to
        raise WeightsError(f"{file} cannot be read as plain tensors: {_fault(str(error))}.") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{file} is not a state dict; convert it to safetensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _fault(said: str) -> str:
    """What is wrong with a file, in a few words: torch's own tell people to let it run its code."""
    if found := re.search(r"GLOBAL (\S+)", said):
        return f"it holds {found[1]}, which runs code when read; get it as safetensors"
    if "TorchScript" in said:
        return "it is a TorchScript archive, which runs code when read; get it as safetensors"
    return "it is truncated, damaged or no checkpoint; download it again"


def load_strictly(net: nn.Module, tensors: Mapping[str, Tensor], origin: Path | str) -> None:
    """Put ``tensors`` in place of ``net``'s own; they become the parameters, nothing is copied.

    Raises :class:`WeightsError` unless names and shapes are exactly ``net``'s, and nothing is left without values.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differ = [name for name in wanted if name in found and found[name] != wanted[name]]
    wrong = [f"{name}: {list(found[name])}, expected {list(wanted[name])}" for name in differ]
    problems = [
        _sample("missing", [name for name in wanted if name not in found]),
        _sample("unexpected", [name for name in found if name not in wanted]),
        _sample("of the wrong shape", wrong),
    ]
    if any(problems):
        raise WeightsError(
            f"{origin} does not fit {type(net).__name__}: {'; '.join(filter(None, problems))}. "
            "It is incomplete or of another architecture; check the model's name, or download it again."
        )
    net.load_state_dict(dict(tensors), strict=True, assign=True)
    hollow = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    if hollow:
        raise WeightsError(f"{origin} does not fill {_sample('buffers', hollow)} that {type(net).__name__} computes.")


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The settings in ``ours`` that ``theirs`` contradicts, as text; empty when there are none. Lists equal tuples."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, list | tuple) else value

    parts = [
        f"{key} is {theirs[key]!r}, expected {value!r}"
        for key, value in ours.items()
        if key in theirs and plain(theirs[key]) != plain(value)
    ]
    return "; ".join(parts[:_SHOWN]) + (f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")


def _below(name: str, prefixes: tuple[str, ...] | None) -> bool:
    return prefixes is None or any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _unsafe(folder: Path) -> str:
    """Names the checkpoints that are there but could run code when read."""
    found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(pattern))
    return f" (there is {', '.join(found)}, which can run code when read; save it as safetensors)" if found else ""


def _sample(label: str, names: list[str]) -> str:
    """``3 missing (a, b, c)``, shortened."""
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {label} ({', '.join(names[:_SHOWN])}{more})"
