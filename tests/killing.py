"""A run that is killed at random moments and goes on, beside one that is not. One process imports what they need and
forks them, as imports would take longer than the runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ZYGOTE = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from importlib import import_module
from pathlib import Path
import torch
torch.set_num_threads(1)

module, function, whole, killed, state, final, within, *rest = sys.argv[2:]
run, killed, chance = getattr(import_module(module), function), Path(killed), random.Random(" ".join([module, *rest]))
state = killed / state

def child(folder):
    pid = os.fork()
    if pid == 0:
        run(Path(folder), *rest)
        os._exit(0)
    return pid

spared = child(whole)
for _ in range(5):
    seen = state.stat().st_mtime_ns if state.exists() else 0
    pid = child(killed)
    while not state.exists() or state.stat().st_mtime_ns == seen:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended without another checkpoint"
        time.sleep(0.002)
    seen, moment = state.stat().st_mtime_ns, time.monotonic() + chance.uniform(0, float(within))
    while time.monotonic() < moment and state.stat().st_mtime_ns == seen:  # so a fast machine does not end it first
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not (killed / final).exists()
assert os.waitpid(child(killed), 0)[1] == os.waitpid(spared, 0)[1] == 0
"""


def whole_and_killed(
    module: str, function: str, place: Path, *rest: str, state: str, final: str, within: float
) -> tuple[Path, Path]:
    """The folders of two runs of ``module.function(folder, *rest)``: one undisturbed, one killed five times, each up to
    ``within`` seconds after a new checkpoint ``state``, at the next one at the latest, and before it wrote ``final``: a
    run needs eleven checkpoints."""
    whole, killed = place / "whole", place / "killed"
    arguments = (Path(__file__).parent, module, function, whole, killed, state, final, within, *rest)
    with subprocess.Popen([sys.executable, "-c", ZYGOTE, *map(str, arguments)], start_new_session=True) as zygote:
        try:
            assert zygote.wait() == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(zygote.pid, signal.SIGKILL)
    return whole, killed
