"""Image sources: a registered dataset, a folder, a Hugging Face dataset (name or object, streaming too), or tensors."""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import attrs
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError
from .loading import load_dataset_plugin
from .registries import registry

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
DATASET_COUNT = 8192
"""How many images of a registered dataset are read where nobody says."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for a damaged file, depending on the format and on where the damage is."""


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as ``[3, H, W]`` float32 in [0, 1]: upright as its EXIF tag says, white where it is transparent."""
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1).float() / 255


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def fit_square(image: Tensor, side: int) -> Tensor:
    """``[3, H, W]`` to ``[3, side, side]``: the centre square, resized (bicubic, antialiased), a small one enlarged."""
    _, height, width = image.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = image[:, top : top + short, left : left + short]
    if short == side:
        return square
    return F.interpolate(square[None], size=(side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)


@attrs.define(eq=False)
class ImageSource:
    """Images in a fixed order, ``[3, H, W]`` float32 in [0, 1]; unreadable ones are skipped, ``skipped`` names them."""

    name: str
    items: Iterable[Any]
    skipped: list[str] = attrs.field(factory=list)

    def __iter__(self) -> Iterator[Tensor]:
        self.skipped.clear()
        return self._read_all(self.skipped)

    def _read_all(self, skipped: list[str]) -> Iterator[Tensor]:
        for position, item in enumerate(self.items):
            try:
                yield _read(item)
            except _UNREADABLE as error:
                label = str(item) if isinstance(item, (str, Path)) else f"{self.name}[{position}]"
                skipped.append(f"{label}: {error}")

    def batches(self, side: int, size: int, limit: int | None = None, skip: int = 0) -> Iterator[Tensor]:
        """``[<= size, 3, side, side]`` batches of the images after the first ``skip``, ``limit`` of them at most.

        Raises :class:`DataError` when there is no readable image at all.
        """
        found = False
        images = itertools.islice(iter(self), skip, None if limit is None else skip + limit)
        while batch := [fit_square(image, side) for image in itertools.islice(images, size)]:
            found = True
            yield torch.stack(batch)
        if not found and not skip:
            reason = f" ({len(self.skipped)} unreadable, the first: {self.skipped[0]})" if self.skipped else ""
            raise DataError(f"image source {self.name!r} holds no readable image{reason}.")

    def fingerprint(self) -> str:
        """Identifies the source in a cache: file names and sizes of a folder, else number and first images."""
        digest = hashlib.sha256(self.name.encode())
        if isinstance(self.items, list) and self.items and isinstance(self.items[0], Path):
            for path in self.items:
                digest.update(f"{path.name}:{path.stat().st_size}".encode())
            return digest.hexdigest()[:16]
        if isinstance(self.items, Sized):
            digest.update(str(len(self.items)).encode())
        for image in itertools.islice(self._read_all([]), 16):
            digest.update((image * 255).round().byte().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def open_images(source: Any, count: int | None = None) -> ImageSource:
    """An :class:`ImageSource` from a dataset name or object, a folder path, a tensor ``[N, 3, H, W]`` or an iterable.

    A name that a plugin offers is its training images, ``count`` of them (default ``DATASET_COUNT``); any other string
    is a folder, or else a Hugging Face dataset, whose rows are read from their ``image`` column. Tensors are float in
    [0, 1] or uint8. A one-shot iterator is read into memory (``count`` at most): search and finetune each pass over it.

    Raises :class:`DataError` for a missing or empty source, ``UnknownNameError`` for a dataset that must be installed.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, str) and (source in registry().datasets or ("dataset", source) in registry().hints):
        return _open_plugin(source, DATASET_COUNT if count is None else count)
    if isinstance(source, (str, Path)):
        return _open_path(source)
    if isinstance(source, Tensor):
        source = list(source)
    elif isinstance(source, Iterator):
        source = list(itertools.islice(source, count))
    elif not isinstance(source, Iterable):
        raise DataError(f"images must be a folder, a dataset or tensors, not a {type(source).__name__}.")
    if hasattr(source, "__len__") and not len(source):
        raise DataError("the image source is empty.")
    return ImageSource(type(source).__name__, _undecoded(source))


def _open_plugin(name: str, count: int) -> ImageSource:
    if count < 1:
        raise DataError(f"cannot take {count} images of dataset {name!r}; ask for at least one.")
    images = load_dataset_plugin(name)().captioned("train", count).images
    return ImageSource(f"{name} ({count} training images)", list(images))


def _open_path(source: str | Path) -> ImageSource:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"folder {str(path)!r} holds no image ({', '.join(sorted(SUFFIXES))}).")
        return ImageSource(str(path), files)
    if path.exists():
        raise DataError(f"images must be a folder, a dataset or tensors; {str(path)!r} is a file.")
    return _open_hub(str(source))


def _open_hub(name: str) -> ImageSource:
    import datasets

    try:
        return ImageSource(name, _undecoded(datasets.load_dataset(name, split="train", streaming=True)))
    except Exception as error:  # datasets raises a different type for each hub, network and format failure
        known = ", ".join(registry().datasets)
        raise DataError(
            f"{name!r} is neither a folder nor a dataset that could be opened ({type(error).__name__}: {error}). "
            f"Check the spelling, or download it first and give the folder; datasets of plugins: {known or 'none'}."
        ) from error


def _undecoded(source: Any) -> Any:
    """A Hugging Face dataset that hands out the files' bytes: if it decoded them, one bad file would end the pass."""
    features = getattr(source, "features", None)
    if hasattr(source, "cast_column") and features and type(features.get("image")).__name__ == "Image":
        return source.cast_column("image", type(features["image"])(decode=False))
    return source


def _read(item: Any) -> Tensor:
    if isinstance(item, dict):
        if "image" not in item:
            raise DataError(f"dataset rows have no 'image' column; columns: {', '.join(map(str, item))}.")
        item = item["image"]
    if isinstance(item, dict) and {"bytes", "path"} <= item.keys():
        item = item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])
    if isinstance(item, (str, Path, io.BytesIO)):
        with Image.open(item) as image:
            return to_tensor(image)
    if isinstance(item, Image.Image):
        return to_tensor(item)
    if isinstance(item, Tensor):
        return _checked(item)
    raise DataError(f"cannot read an image from a {type(item).__name__}; give tensors, PIL images or file paths.")


def _checked(image: Tensor) -> Tensor:
    """A caller's own tensor: a wrong one is the caller's mistake, not a damaged file to be skipped."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise DataError(f"image tensors must be [3, height, width], got {list(image.shape)}.")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise DataError(f"image tensors must be uint8 or float in [0, 1], got {image.dtype}.")
    low, high = float(image.min()), float(image.max())
    if not (low >= -0.01 and high <= 1.01):  # so written, NaN is refused too
        raise DataError(f"float image tensors must lie in [0, 1], got values from {low:g} to {high:g}.")
    return image.float().clamp(0, 1)
