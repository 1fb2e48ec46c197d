"""Where a result came from: versions, model records and revisions."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PACKAGES = (
    "stitchvm",
    "stitchvm-shapes",
    "torch",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "timm",
    "accelerate",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def weights_digest(module: nn.Module) -> str:
    """Tells a network from a retrained one of the same name, whatever its precision: by name, shape and first
    entries of every tensor, rounded to bfloat16.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def network_identity(network: Any) -> dict[str, Any]:
    """JSON-able: :func:`model_identity` with a digest of the weights, and of a backbone the embedded guidance where it
    was set to another than it was loaded at."""
    guidance, own = (getattr(network, name, None) for name in ("guidance", "own_guidance"))
    embedded = {} if guidance == own else {"guidance": guidance}
    return {**model_identity(network), "weights": weights_digest(network.net), **embedded}


def sampled_identity(backbone: Any) -> dict[str, Any]:
    """JSON-able: :func:`network_identity` of a backbone with the guidance that it is given as a number, if any."""
    embedded = {} if backbone.guidance is None else {"guidance": backbone.guidance}
    return {**network_identity(backbone), **embedded}


def model_identity(network: Any) -> dict[str, Any]:
    """JSON-able: name, family, repo and revision of a loaded network; a network built by hand has only its class
    name."""
    record = getattr(network, "record", None)
    if record is None:
        return {"name": type(network).__name__}
    return {key: getattr(record, key) for key in ("name", "family", "repo", "revision", "licence")}
