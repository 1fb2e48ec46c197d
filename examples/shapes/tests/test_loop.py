"""The training loop, killed and resumed."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stitchvm_shapes.train.loop import Loop, NonFiniteLossError, Schedule, Settings
from stitchvm_shapes.train.muon import Muon, orthogonalise


class Toy:
    """A regression with dropout, a matrix for Muon and a vector for AdamW."""

    def __init__(self, bad: int = -1) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.modules = {"net": self.net}
        self.bad = bad

    def optimizers(self):
        matrix = self.net[0].weight
        others = [p for p in self.net.parameters() if p is not matrix]
        return [Muon([matrix], 1e-2), torch.optim.AdamW(others, lr=1e-2)]

    def loss(self, step, generator):
        x = torch.randn(32, 8, generator=generator)
        loss = (self.net(x)[:, 0] - x.sin().sum(1)).square().mean()
        return loss * float("nan") if step == self.bad else loss, {}


def settings(folder: Path, save_seconds: float = 60.0) -> Settings:
    return Settings("toy", folder, Schedule(60, warmup=5), save_seconds=save_seconds)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path):
    straight = Loop(Toy(), settings(tmp_path / "a"))
    straight.run()
    for stop in (7, 8, 33, 60):
        resumed = Loop(Toy(), settings(tmp_path / "b"))
        resumed.run(stop)
    assert same(straight.task.net.state_dict(), resumed.task.net.state_dict())
    assert same(straight.averages, resumed.averages)


def test_killed_equals_never_killed_bit_for_bit(tmp_path):
    script = (
        "import sys, pathlib, time; sys.path.insert(0, sys.argv[1])\n"
        "import test_loop as t; toy = t.Toy(); inner = toy.loss\n"
        "def slow(step, generator): time.sleep(0.02); return inner(step, generator)\n"
        "toy.loss = slow; t.Loop(toy, t.settings(pathlib.Path(sys.argv[2]), 0.0)).run()"
    )
    checkpoint = tmp_path / "toy.pt"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)])
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.005)
        process.kill()
        process.wait()
    resumed = Loop(Toy(), settings(tmp_path))
    assert resumed.progress.step > 0
    resumed.run()
    straight = Loop(Toy(), settings(tmp_path / "straight"))
    straight.run()
    assert same(straight.averages, resumed.averages)


def test_a_longer_schedule_does_not_change_what_is_trained_before_the_decay():
    short, long = Schedule(100, warmup=10), Schedule(150, warmup=10)
    assert all(short(step) == long(step) for step in range(50))
    assert short(100) == 0
    falls = [short(step) for step in range(50, 101)]
    assert all(a >= b for a, b in itertools.pairwise(falls))


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    Loop(Toy(), settings(tmp_path)).run(10)
    with pytest.raises(NonFiniteLossError, match="step 12"):
        Loop(Toy(bad=12), settings(tmp_path)).run()
    assert Loop(Toy(), settings(tmp_path)).progress.step == 10


@pytest.mark.parametrize("shape", [(3, 20, 40), (2, 40, 20), (1, 32, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.max() < 1.3
    assert values.median() > 0.6
