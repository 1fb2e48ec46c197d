"""What loading a head alone reads and holds, against the whole backbone: full-size random checkpoints, written for it.

    python benchmarks/head_loading.py --out head_loading.json      # about 6 GB of free disk, given back at the end

``sd3.5-medium`` is measured at its full size. For ``flux-dev`` the share is computed from the tensors' full-size shapes
and measured on a checkpoint of the same depth (19 + 38 blocks) with fewer attention heads. Every measurement is a fresh
process that loads through ``core.load_backbone``, then touches every page of every tensor it holds, so that memory
mapped and never read cannot pass for memory saved. Needs Linux. Exits with 1 when a head takes more than its limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from stitchvm import core
from stitchvm.core import Backbone, BackboneRecord

GB = 1e9
PAGE = 4096
"""Bytes; a machine with larger pages is only touched more often than needed."""

SHARD = 1_000_000_000
"""Bytes of tensors in a shard."""


@attrs.frozen
class Case:
    """One checkpoint: the registered ``name``, the head's ``cut``, the largest ``limit`` of the whole's bytes that the
    head may read, and settings of the transformer that a ``narrow`` checkpoint has instead of the registered ones."""

    name: str
    cut: int
    limit: float
    narrow: dict[str, Any] = attrs.field(factory=dict)

    @property
    def record(self) -> BackboneRecord:
        """The registry's record, narrowed."""
        record = core.registry().backbone(self.name)
        transformer = record.architecture["transformer"] | self.narrow
        return attrs.evolve(record, architecture=record.architecture | {"transformer": transformer})


CASES = (
    Case("sd3.5-medium", 4, 0.30),
    Case("flux-dev", 4, 0.20, {"num_attention_heads": 4}),
)


def share_of_shapes(record: BackboneRecord, cut: int) -> float:
    """The part of the transformer's bytes that a head at ``cut`` reads, from shapes on the meta device alone."""
    whole = core.build_geometry(record)
    return _bytes(whole.prune(0, cut).net.state_dict()) / _bytes(whole.net.state_dict())


def write_checkpoint(record: BackboneRecord, folder: Path, shard: int = SHARD) -> None:
    """A diffusers folder with the record's transformer in random bfloat16 shards, and the configurations beside it."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    geometry = core.build_geometry(record)
    geometry.net.save_config(folder / "transformer")
    with torch.device("meta"):
        AutoencoderKL(**record.architecture["vae"]).save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**record.architecture["scheduler"]).save_config(folder / "scheduler")
    stem, homes = folder / "transformer" / "diffusion_pytorch_model", {}
    shards = list(_shards(geometry.net.state_dict(), shard))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for k, shapes in enumerate(shards, 1):
        file = stem.with_name(f"{stem.name}-{k:05d}-of-{len(shards):05d}.safetensors")
        save_file({name: _filled(shape, noise) for name, shape in shapes.items()}, file)
        homes |= dict.fromkeys(shapes, file.name)
    index = {"metadata": {}, "weight_map": homes}
    stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index))


def _shards(tensors: Mapping[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Size]]:
    """Names and shapes, in order, in groups of at most ``size`` bytes of bfloat16."""
    group: dict[str, torch.Size] = {}
    filled = 0
    for name, tensor in tensors.items():
        if group and filled + 2 * tensor.numel() > size:
            yield group
            group, filled = {}, 0
        group[name] = tensor.shape
        filled += 2 * tensor.numel()
    yield group


def _filled(shape: torch.Size, noise: torch.Tensor) -> torch.Tensor:
    """One block of noise over and over: as random as loading needs, and quick to write."""
    count = shape.numel()
    return noise.repeat(-(-count // len(noise)))[:count].reshape(shape).clone()


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure(record: BackboneRecord, cut: int | None) -> dict[str, float]:
    """Load in this process, counting what is asked of the files; ``peak`` and ``before`` are resident bytes."""
    from stitchvm.plugins import checkpoints
    from stitchvm.plugins.backbones import flux, mmdit  # noqa: F401 - importing them is not loading

    read, opened, plain = {}, [], checkpoints.safe_open

    class Counting:
        """``safe_open`` that notes every file it opens and every tensor it hands out."""

        def __init__(self, file: str, **settings: Any) -> None:
            opened.append(Path(file).stat().st_size)
            self._context = plain(file, **settings)

        def __enter__(self) -> Counting:
            self._handle = self._context.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._context.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._handle.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read[name] = self._handle.get_tensor(name)
            return read[name]

    checkpoints.safe_open = Counting
    before, started = _memory("VmRSS"), time.perf_counter()
    backbone = core.load_backbone(record, cut=cut)
    seconds = time.perf_counter() - started
    _touch(backbone)
    return {"read": _bytes(read), "shards": sum(opened), "before": before, "peak": _memory("VmHWM"), "seconds": seconds}


def _touch(backbone: Backbone) -> None:
    for tensor in backbone.net.state_dict().values():
        tensor.reshape(-1).view(torch.uint8)[::PAGE].sum()


def _memory(line: str) -> int:
    """Resident bytes of this process: now (``VmRSS``) or at most (``VmHWM``). Linux's own count, since ``ru_maxrss``
    begins with what the parent held when it started this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(f"{line}:"))


def _fresh(case: Case, folder: Path, cut: int | None) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", case.name, str(folder), str(cut)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(case: Case, scratch: Path | None) -> dict[str, Any]:
    """Write one checkpoint, load its head and its whole, and give the disk back."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder = Path(place)
        write_checkpoint(case.record, folder)
        head, whole = _fresh(case, folder, case.cut), _fresh(case, folder, None)
    grown = {name: result["peak"] - result["before"] for name, result in (("head", head), ("whole", whole))}
    full = share_of_shapes(core.registry().backbone(case.name), case.cut)
    shares = {"full_size": full, "read": head["read"] / whole["read"], "memory": grown["head"] / grown["whole"]}
    return {
        "name": case.name, "cut": case.cut, "narrow": case.narrow, "limit": case.limit, "head": head, "whole": whole,
        "shares": shares, "within": max(shares["full_size"], shares["read"], shares["memory"]) <= case.limit,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The measurements for people, in GB."""
    lines = [
        "| backbone | loaded | tensors read | shards opened | memory grown by | peak | seconds |",
        "| --- " * 7 + "|",
    ]
    for result in results:
        label = result["name"] + (" (narrow)" if result["narrow"] else "")
        for part, name in (("head", f"{result['cut']} blocks"), ("whole", "whole")):
            measured = result[part]
            figures = [measured["read"], measured["shards"], measured["peak"] - measured["before"], measured["peak"]]
            sizes = " | ".join(f"{size / GB:.2f}" for size in figures)
            lines.append(f"| {label} | {name} | {sizes} | {measured['seconds']:.1f} |")
    for result in results:
        shares = result["shares"]
        lines.append(
            f"{result['name']}: the head's share is {shares['full_size']:.1%} of the bytes at full size; measured "
            f"{shares['read']:.1%} read, {shares['memory']:.1%} of the memory; limit {result['limit']:.0%}: "
            f"{'ok' if result['within'] else 'TOO MUCH'}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written (default: the temporary folder)")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "FOLDER", "CUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, folder, cut = given.measure
        case = next(case for case in CASES if case.name == name)
        record = attrs.evolve(case.record, repo=None, path=folder)
        sys.stdout.write(json.dumps(measure(record, None if cut == "None" else int(cut))) + "\n")
        return 0
    results = [run(case, given.scratch) for case in CASES]
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(table(results) + "\n")
    return 0 if all(result["within"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
