"""Rewards taken out of a joint value model, and value models of single rewards put together as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stitchvm import core
from stitchvm.core import ConfigError, CostMeter, Stitched, StitchedValue, Sum, Tweedie, artefact
from stitchvm.core.branch import Interface
from stitchvm.core.stitching.beginnings import joined
from test_joint import AESTHETIC, DFN, HPS, PROBES, PROMPTS, alone, made, sd3, twin


@pytest.fixture
def latents() -> torch.Tensor:
    x, _ = sd3().example(3)
    return torch.randn(x.latents.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_one_reward_of_several_is_a_value_of_its_own(latents, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(artefact, "load_backbone", lambda *_, **__: sd3())
    monkeypatch.setattr(artefact, "load_reward", lambda name, **_: twin(name))
    value = made((DFN, HPS), (2.0, 0.5))
    value.alone(HPS).save_pretrained(tmp_path)
    single = StitchedValue.from_pretrained(tmp_path)
    assert (single.names, single.weights, single.interface()) == ((HPS,), (1.0,), value.interface(HPS))
    assert torch.equal(single(latents, 0.3, PROMPTS), alone(value, HPS)(latents, 0.3, PROMPTS))
    with pytest.raises(core.SliceError, match="not 'nothing'"):
        value.alone("nothing")


@torch.no_grad()
def test_rewards_stitched_apart_are_read_together(latents) -> None:
    value = made((DFN, HPS), (2.0, -0.5))
    again = StitchedValue.together([value.alone(DFN), value.alone(HPS)], (2.0, -0.5))
    with CostMeter() as cost:
        read = again(latents, 0.3, PROMPTS)
    assert dict(cost.passes) == {"head": 3, "tail": 6}
    assert torch.equal(read, value(latents, 0.3, PROMPTS))
    assert (again.names, again.weights) == ((DFN, HPS), (2.0, -0.5))
    assert again.provenance.search.keys() == {DFN, HPS}
    assert StitchedValue.together([value, made((AESTHETIC,))]).weights == (2.0, -0.5, 1.0)


def test_only_values_of_one_head_and_of_different_rewards_go_together() -> None:
    value = made((DFN, HPS))
    with pytest.raises(ConfigError, match=f"{HPS} is read by more than one"):
        StitchedValue.together([value, value.alone(HPS)])
    with pytest.raises(ConfigError, match="no value model was given"):
        StitchedValue.together([])
    found = core.search_jointly(sd3(), {AESTHETIC: twin(AESTHETIC)}, cuts=(1,), blocks=(1,), **PROBES)
    deeper = joined(sd3(), {AESTHETIC: twin(AESTHETIC)}, found.results, {AESTHETIC: Interface(1, 1)})
    with pytest.raises(core.ArtefactError, match="cut after block 2 and 1"):
        StitchedValue.together([value, deeper])
    asking = made((AESTHETIC,)).alone(AESTHETIC)
    asking.prompted = True
    with pytest.raises(core.ArtefactError, match="trained under prompts False and True"):
        StitchedValue.together([value, asking])


def test_a_sum_of_values_gives_each_reward_its_own_text() -> None:
    """What the same values read together give, and what Tweedie's estimates of the single rewards add up to."""
    value = made((DFN, HPS), (2.0, -0.5))
    asked: dict[str, Any] = {"prompts": PROMPTS, "particles": 2, "steps": 2, "seed": 1, "progress": False}
    whole = core.align("best-of-n", sd3(), value, **asked)
    parts = Sum([value.alone(DFN), Stitched(value.alone(HPS))], (2.0, -0.5))
    summed = core.align("best-of-n", sd3(), parts, **asked)
    assert torch.equal(summed.rewards, whole.rewards)
    guided: dict[str, Any] = {**asked, "strength": 0.1}
    apart = core.align("dps", sd3(), parts, **guided)
    together = core.align("dps", sd3(), value, **guided)
    torch.testing.assert_close(apart.particles.latents, together.particles.latents)
    mixed = Sum([value.alone(DFN), Tweedie(twin(HPS))], (1.0, 1.0))
    assert core.align("dps", sd3(), mixed, **guided).rewards.isfinite().all()
    with pytest.raises(ConfigError, match=f"the value estimates 2 {DFN}.*but reward is {HPS}"):
        core.align("dps", sd3(), parts, reward=twin(HPS), **guided)
