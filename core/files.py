"""Writing files so that nothing is ever half written: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ArtefactError, OutputError


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into one :class:`OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {str(path)!r}: {error.strerror or error}. Choose another output folder or free some space."
        ) from error


def cache_key(settings: Mapping[str, Any]) -> str:
    """A folder name for these settings, JSON-able: the same for the same ones, in whatever order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def make_folder(path: str | Path) -> Path:
    """The folder, created with its parents; :class:`OutputError` when it cannot be."""
    folder = Path(path).expanduser()
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, then put it in place; a failure leaves the old file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with output_errors(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically, as UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically, indented; NaN is refused because JSON has none."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; :class:`ArtefactError` when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{str(path)!r} does not exist.") from error
    except ValueError as error:
        raise ArtefactError(f"{str(path)!r} is not valid JSON ({error}); it may be truncated.") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{str(path)!r} holds a {type(content).__name__}, expected a JSON object.")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are made contiguous and unshared."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def save(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # what a new file is given here; safetensors keeps others from reading its own
        try:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, metadata)  # type: ignore[arg-type]
        except SafetensorError as error:  # it hides the operating system's own error in its text
            raise OSError(str(error)) from error
        temporary.chmod(mode)

    write_atomically(path, save)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what safetensors says of a file that is missing or damaged into one :class:`ArtefactError`."""
    from safetensors import SafetensorError

    if not path.is_file():
        raise ArtefactError(f"{str(path)!r} does not exist.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{str(path)!r} cannot be read ({error}); it may be truncated. Write it again.") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """A safetensors file's tensors on the CPU; :class:`ArtefactError` when it is missing or truncated."""
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's own metadata; :class:`ArtefactError` when the file is missing or truncated."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
