"""What DiffusionNFT, Diffusion-DPO and Flow-GRPO collect: whose network samples and is read, and what is kept of it.

Policy, old policy and frozen backbone are three networks here (``moved``), so that none can stand in for another.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import attrs
import pytest
import torch
from torch import Tensor

from stitchvm.core import Backbone, NoisyLatent, TrainProblem
from stitchvm.plugins.aligners.anchors import levels_above
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from stitchvm.plugins.aligners.diffusion_nft import DiffusionNft
from stitchvm.plugins.aligners.flow_grpo import FlowGrpo
from training_worlds import STEPS, UPDATE, Foreseen, Gapped, problem, reached_by

OWNERS = torch.tensor([0, 0, 1, 1])
HARDLY = {"noise_level": 1e-6}
"""So that where a window ends is where the ODE would be."""


def networks(task: TrainProblem) -> dict[str, Backbone]:
    assert task.old is not None
    return {"policy": task.policy.backbone, "old": task.old.backbone, "frozen": task.reference}


def foreseen(task: TrainProblem, sampler: Backbone, reader: Backbone, stop: int) -> float:
    """Mean value by hand: ``tanh`` of the mean of ``z - sigma u`` where ``sampler`` stops and ``reader`` reads."""
    z, level = reached_by(task, sampler, task.noise(task.seeds(UPDATE, 2, 0)), OWNERS, stop), task.sigmas[stop]
    with torch.no_grad():
        u = reader.upstream(NoisyLatent(z, level.expand(4)), task.conditions.index(OWNERS))
    return float(torch.tanh((z - level * u).flatten(1).mean(1)).mean())


@pytest.mark.parametrize(("method", "whose"), [
    (DiffusionNft(samples_per_prompt=2, stop=(2, 2)), "old"),
    (DiffusionDpo(samples_per_prompt=2, stop=(2, 2)), "policy"),
    (FlowGrpo(samples_per_prompt=2, stop=(2, 2), window_size=1, window_range=(0, 1), **HARDLY), "policy"),
], ids=["nft", "dpo", "grpo"])  # fmt: skip
def test_the_network_that_samples_is_the_one_that_a_value_reads(method, whose):
    task = problem(estimator=Foreseen(), moved=0.1)
    nets = networks(task)
    truth = {(a, b): foreseen(task, nets[a], nets[b], 2) for a in nets for b in nets}
    found = method.collect(task, UPDATE).figures["value"]
    assert found == pytest.approx(truth.pop((whose, whose)), abs=1e-5)
    assert min(abs(found - other) for other in truth.values()) > 1e-4


@pytest.mark.parametrize("branch", [False, True])
def test_grpo_goes_by_the_policy_up_to_its_window_and_after_it(branch):
    task = problem(moved=0.1)
    settings = FlowGrpo(samples_per_prompt=2, window_size=1, window_range=(2, 3), branch=branch, **HARDLY)
    found, noise = settings.collect(task, UPDATE), task.noise(task.seeds(UPDATE, 2, 0))
    noise = noise[[0, 0, 2, 2]] if branch else noise
    ends = {name: reached_by(task, net, noise, OWNERS, 2) for name, net in networks(task).items()}
    torch.testing.assert_close(found.rows["before"], ends["policy"], rtol=1e-4, atol=1e-5)
    assert found.rows["step"].tolist() == [2] * 4
    for other in ("old", "frozen"):
        assert not torch.allclose(found.rows["before"], ends[other], atol=1e-3)
    last = {name: mean_brightness(reached_by(task, net, noise, OWNERS, STEPS)) for name, net in networks(task).items()}
    assert found.figures["value"] == pytest.approx(last["policy"], abs=1e-5)
    after = reached_by(task, task.policy.backbone, noise, OWNERS, 3)
    torch.testing.assert_close(found.rows["after"], after, rtol=1e-4, atol=1e-4)


def mean_brightness(latents: Tensor) -> float:
    return float(torch.tanh(latents.flatten(1).mean(1)).mean())


@pytest.mark.parametrize("whole_update", [True, False], ids=["update", "group"])
@pytest.mark.parametrize("method", [DiffusionNft, FlowGrpo])
def test_values_are_standardised_by_the_deviation_that_is_asked_for(method, whole_update):
    """``(v - mean of its prompt) / (s + 1e-4)``, ``s`` of the whole update's values or of the prompt's own."""
    task = problem(moved=0.1)
    if method is DiffusionNft:
        settings = DiffusionNft(samples_per_prompt=4, group_std=not whole_update)
        found = settings.collect(task, UPDATE).samples
        ends, advantage = found["anchor"], (found["optimality"] - 0.5) * 10
    else:
        settings = FlowGrpo(samples_per_prompt=4, group_std=not whole_update, **HARDLY)
        advantage = settings.collect(task, UPDATE).samples["advantage"]
        noise, owners = task.noise(task.seeds(UPDATE, 4, 0)), torch.arange(2).repeat_interleave(4)
        ends = reached_by(task, task.policy.backbone, noise, owners, STEPS)
    values = torch.tanh(ends.flatten(1).mean(1)).view(2, 4)
    own, whole = values.std(1, correction=0, keepdim=True), values.std(correction=0)
    centred = values - values.mean(1, keepdim=True)
    expected, other = centred / (whole + 1e-4), centred / (own + 1e-4)
    if not whole_update:
        expected, other = other, expected
    torch.testing.assert_close(advantage.view(2, 4), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, other, atol=0.05)


@pytest.mark.parametrize("method", [DiffusionNft(samples_per_prompt=3), FlowGrpo(samples_per_prompt=3)],
                         ids=["nft", "grpo"])  # fmt: skip
def test_no_row_is_learnt_from_a_sample_without_a_value_and_the_others_keep_all_of_theirs(method):
    whole = method.collect(problem(moved=0.1), UPDATE)
    each = int((whole.rows["sample"] == 0).sum())
    with pytest.warns(RuntimeWarning, match="2 of 6 samples have no finite value"):
        found = method.collect(problem(estimator=Gapped((1, 5)), moved=0.1), UPDATE)
    assert sorted(found.rows["sample"].tolist()) == sorted([0, 2, 3, 4] * each)
    assert {len(entry) for entry in found.rows.values()} == {4 * each}


def levels_of(rows: dict[str, Tensor]) -> list[tuple[float, ...]]:
    """Each sample's noise levels, in order."""
    return [tuple(sorted(rows["sigma"][rows["sample"] == owner].tolist())) for owner in rows["sample"].unique()]


@pytest.mark.parametrize("method", [DiffusionNft, DiffusionDpo])
def test_each_has_noise_levels_of_its_own(method):
    task, settings = problem(), method(samples_per_prompt=2, stop=(4, 4), levels=2)
    updates = [levels_of(settings.collect(task, attrs.evolve(UPDATE, number=n)).rows) for n in range(8)]
    assert {len(set(one)) for found in updates for one in found} == {2}  # no level twice
    assert len({one for found in updates for one in found}) > 3
    assert sum(len(set(found)) > 1 for found in updates) > 3


def test_every_set_of_noise_levels_is_drawn_as_often():
    """Each of the six pairs of four levels, by a sample and by two of one update together: within four standard
    errors."""
    task, times, pairs, alike = problem(), 1000, Counter(), 0
    for number in range(times):
        levels = levels_above(task, attrs.evolve(UPDATE, number=number), 1, 4, 2)
        first, second = (tuple(sorted(one)) for one in levels.tolist())
        pairs.update((first, second))
        alike += first == second
    assert set(pairs) == set(combinations(sorted(task.sigmas[:4].tolist()), 2))
    for count, draws in [(alike, times), *((count, 2 * times) for count in pairs.values())]:
        assert count / draws == pytest.approx(1 / 6, abs=4 * (5 / 36 / draws) ** 0.5)
