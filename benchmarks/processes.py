"""What the benchmarks share that measure every figure in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

DTYPES = ("bfloat16", "float32")

FORWARDED = ("repeats", "threads", "dtype", "steps")
"""Options that a figure's own process is given too."""


def fresh(script: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What ``script --figure name`` prints as JSON; what it died of where it did, such as a lack of memory."""
    command = [sys.executable, script, "--figure", name, *["--small"] * given.small]
    for option in FORWARDED:
        if getattr(given, option, None) is not None:
            command += [f"--{option}", str(getattr(given, option))]
    # some libraries read their number of threads here, before torch is told
    surroundings = os.environ | ({"OMP_NUM_THREADS": str(given.threads)} if given.threads else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode:
        sys.stderr.write(done.stderr)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"killed by signal {-done.returncode}" if done.returncode < 0 else last}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def parser_of(about: str, figures: Collection[str]) -> argparse.ArgumentParser:
    """Of a script that measures ``figures``, with the options that all have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own)")
    parser.add_argument("--repeats", type=int, default=3, help="steps measured a figure (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="the registry's twins; their ratios mean nothing")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all networks (default: %(default)s)")
    parser.add_argument(
        "--only", choices=figures, metavar="FIGURE", action="append",
        help=f"may be repeated; one of: {', '.join(figures)}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="where to write JSON (default: beside this file, for all figures at full size)"
    )
    parser.add_argument("--figure", choices=figures, help=argparse.SUPPRESS)
    return parser


def arguments(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """What ``given`` says; torch's threads are set to it."""
    found = parser.parse_args(given)
    if found.repeats < 1 or (found.threads is not None and found.threads < 1):
        parser.error("--repeats and --threads must be at least 1.")
    if found.threads and (found.figure or getattr(found, "in_turn", False)):
        torch.set_num_threads(found.threads)
    return found


def processor(device: torch.device) -> str:
    """The name of what runs, and of a CPU the vector instructions that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), "cpu")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
