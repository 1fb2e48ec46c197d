"""Training in several processes: what two of them give is what one would have given, sharded or not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import Tensor

import families
from stitchvm import core
from stitchvm.core import LoraSettings
from stitchvm.core.files import read_tensors
from stitchvm.core.training import evaluation
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from test_training import METHODS, PROMPTS, lora_of, run
from training_worlds import Brightness

SHARDED = DiffusionNft(samples_per_prompt=3, stop=(2, 3))
"""Sampled from an old policy of its own, which is sharded too."""
WHOLE: dict[str, Any] = {"lora": None, "learning_rate": 1e-3, "batch": 2}


class Lost(Brightness):
    """No number for the darkest samples, which are dropped: in the second update of the test, by one process alone."""

    def __call__(self, *arguments: Any) -> Tensor:
        value = super().__call__(*arguments)
        return value.masked_fill(value < -0.12, torch.nan)


class Diverging(DiffusionNft):
    """Its old policy leaves the finite range in the second update, in one process alone."""

    def collect(self, problem: core.TrainProblem, update: core.Update) -> core.Experience:
        assert problem.old is not None
        if update.number == 1 and update.places[0] == 1:
            with torch.no_grad():
                next(iter(problem.old.parameters.values())).fill_(torch.inf)
        return super().collect(problem, update)


TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
from importlib import import_module
from pathlib import Path
import torch
torch.set_num_threads(1)
run, started = getattr(import_module(sys.argv[2]), sys.argv[3]), []
for rank in ("0", "1"):  # after the imports, which take longer than what is run
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = rank
    started.append(os.fork())
    if started[-1] == 0:
        break
if started[-1] == 0:
    run(Path(sys.argv[4]))
else:
    sys.exit(any([os.waitpid(each, 0)[1] != 0 for each in started]))
"""


def start_two(function: Callable[[Path], None], folder: Path) -> subprocess.Popen[bytes]:
    """Two processes of one group (gloo), as a launcher starts them, that run a test module's ``function(folder)``; the
    exit code is 0 where both end well."""
    arguments = [str(Path(__file__).parent), function.__module__, function.__name__, str(folder)]
    return subprocess.Popen([sys.executable, "-c", TWO, *arguments], env={**os.environ, **group()})


def group() -> dict[str, str]:
    """What a launcher tells the processes of a group of two (gloo), but their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}


def share(folder: Path) -> None:
    for name, method in METHODS.items():
        run(method, folder / name, updates=2)


def shard(folder: Path) -> None:
    run(SHARDED, folder, updates=2, value=Lost(), shard=True, **WHOLE)
    result = run(SHARDED, folder, updates=4, value=Lost(), shard=True, **WHOLE)
    parameters: dict[str, Any] = result.policy.parameters
    held = sum(parameter.to_local().numel() for parameter in parameters.values())
    whole = sum(parameter.numel() for parameter in parameters.values())
    assert 0.45 * whole < held < 0.55 * whole, (held, whole)


def diverge(folder: Path) -> None:
    with pytest.raises(core.NonFiniteError, match="a rollout left the finite range"):
        run(Diverging(samples_per_prompt=3), folder)


def evaluate(folder: Path) -> None:
    """Five pictures by the sum of two rewards and one that is held out, two a pass; notes how many each process drew,
    and how many it had the last reward score."""
    drawn: list[int] = []
    scored: list[int] = []
    sample, held_out = evaluation.run_sampler, families.clip(3)
    rate = type(held_out).rate

    def counted(denoiser: Any, noise: Tensor, *schedule: Any) -> Tensor:
        drawn.append(len(noise))
        return sample(denoiser, noise, *schedule)

    def rated(reward: core.Reward, images: Tensor, condition: core.Condition) -> Tensor:
        if reward is held_out:
            scored.append(len(images))
        return rate(reward, images, condition)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluation, "run_sampler", counted)
        patched.setattr(type(held_out), "rate", rated)
        core.train(
            METHODS["draft"], families.mmdit(), Brightness(), PROMPTS, out=folder, steps=3, progress=False,
            reward=core.JointReward({"one": families.clip(1), "two": families.clip(2)}, [1.0, 0.5]),
            held_out_rewards=[held_out],
            training=core.TrainSettings(updates=1, prompts_per_update=2, batch=2, tracker=None,
                                        lora=LoraSettings(rank=2, alpha=4)),
            evaluation_prompts=[f"a ball of colour {number}" for number in range(5)],
        )  # fmt: skip
    (folder / f"drawn-{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps([drawn, scored]))


def diverge_in_an_evaluation(folder: Path) -> None:
    def stopped(*_: object) -> Tensor:
        raise core.NonFiniteError("left the finite range")

    with pytest.MonkeyPatch.context() as patched:
        if os.environ["RANK"] == "1":
            patched.setattr(evaluation, "run_sampler", stopped)
        with pytest.raises(core.NonFiniteError, match="the samples after update 0 left the finite range"):
            run(METHODS["draft"], folder)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], begin: dict[str, Tensor]) -> None:
    """Within 2 % of the largest step: sums of gradients differ in their order alone, which Adam's first steps enlarge
    where one is near 0."""
    step = max(float((theirs[key] - begin[key]).abs().max()) for key in theirs)
    assert step > 1e-3
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0.02 * step)


def test_two_processes_give_the_single_ones_result(tmp_path):
    both = start_two(share, tmp_path / "two")
    for name, method in METHODS.items():
        run(method, tmp_path / "one" / name, updates=2)
    assert both.wait() == 0
    policy = core.Policy.of(families.mmdit(), LoraSettings(rank=2, alpha=4))
    begin = {f"transformer.{n.replace('.default', '')}": p for n, p in policy.tensors().items()}
    for name in METHODS:
        assert_close(lora_of(tmp_path / "two" / name), lora_of(tmp_path / "one" / name), begin)


def test_a_sharded_network_trains_like_a_whole_one_resumes_and_is_saved_whole(tmp_path):
    """Each process holds half of the numbers; the checkpoint and what diffusers loads hold all of them. The processes
    need not have equally many batches."""
    both = start_two(shard, tmp_path / "two")
    with pytest.warns(RuntimeWarning, match="2 of 6 samples have no finite value and are dropped"):
        run(SHARDED, tmp_path / "one", updates=4, value=Lost(), **WHOLE)
    assert both.wait() == 0
    one, two = (read_tensors(tmp_path / which / "state.safetensors") for which in ("one", "two"))
    begin = {f"{part}.{n}": p for part in ("policy", "average", "old")
             for n, p in families.mmdit().net.named_parameters()}  # fmt: skip
    assert {key: tensor.shape for key, tensor in one.items()} == {key: tensor.shape for key, tensor in two.items()}
    assert_close({key: two[key] for key in begin}, {key: one[key] for key in begin}, begin)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "two" / "transformer")
    averages = {key.removeprefix("average."): t for key, t in two.items() if key.startswith("average.")}
    assert averages.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(parameter, averages[name]) for name, parameter in loaded.named_parameters())
    for which in ("one", "two"):  # a whole network goes on where a sharded one was
        run(SHARDED, tmp_path / which, updates=5, value=Lost(), **WHOLE)
    one, two = (read_tensors(tmp_path / which / "state.safetensors") for which in ("one", "two"))
    assert_close({key: two[key] for key in begin}, {key: one[key] for key in begin}, begin)


def test_processes_share_an_evaluation(tmp_path):
    """Each draws and scores a part of the pictures, and all know all scores; one that diverges stops both."""
    both = start_two(evaluate, tmp_path / "two")
    evaluate(tmp_path / "one")
    assert both.wait() == 0
    drawn = {name: json.loads((tmp_path / name).read_text())
             for name in ("one/drawn-alone.json", "two/drawn-0.json", "two/drawn-1.json")}  # fmt: skip
    parts = [[[2, 2, 1] * 2] * 2, [[2, 1] * 2] * 2, [[2, 1] * 2] * 2]
    assert list(drawn.values()) == parts, "before and after the update"
    one, two = (json.loads((tmp_path / which / "train.json").read_text())["evaluations"] for which in ("one", "two"))
    for ours, theirs in zip(two, one, strict=True):
        for kind in ("rewards", "parts"):
            assert ours[kind] == {name: pytest.approx(each, rel=1e-4) for name, each in theirs[kind].items()}
        assert len(theirs["scores"]) == 2, "of the trained sum and the held-out reward"
        for name, scores in theirs["scores"].items():
            assert ours["scores"][name] == pytest.approx(scores, rel=1e-4) and len(set(scores)) == 5
    pictures = [np.asarray(Image.open(tmp_path / which / "grids" / "00000.png"), dtype=int) for which in ("one", "two")]
    assert abs(pictures[0] - pictures[1]).max() <= 1, "in the order of their prompts"
    assert start_two(diverge_in_an_evaluation, tmp_path / "diverged").wait() == 0


def test_a_rollout_that_diverges_in_one_process_stops_all_of_them(tmp_path):
    """One that stopped alone would leave the others waiting, until their group is lost."""
    assert start_two(diverge, tmp_path).wait() == 0
    kept = read_tensors(tmp_path / "state.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


LEAVING = """
import time
import torch
from torch import distributed
from stitchvm.core.processes import join_group
number = join_group(torch.device("cpu")).process_index
time.sleep(2 * number)
work = distributed.all_reduce(torch.ones(1), async_op=True)
if number:
    work.wait()
"""


def test_a_process_that_ends_while_gloo_still_works_is_not_aborted():
    """As one is whose last sum is done while a thread of gloo's still holds its tensor, a variable of its script."""
    common = {**os.environ, **group()}
    both = [
        subprocess.Popen([sys.executable, "-c", LEAVING], env={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in both] == [0, 0]


def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    with pytest.raises(core.ConfigError, match="shard is set, but there is one process; start several with accelerate"):
        run(SHARDED, tmp_path, shard=True, **WHOLE)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch --use_fsdp
    with pytest.raises(core.ConfigError, match="there is one process"):
        run(SHARDED, tmp_path, **WHOLE)
    with pytest.raises(core.ConfigError, match="a LoRA is too small to be sharded"):
        core.Policy.of(families.mmdit(), LoraSettings(), mesh=object())
