"""Rewards taken out of a joint value model, and value models of single rewards put together as one."""

from __future__ import annotations

import pytest
import torch

from stitchvm import core
from stitchvm.core import ConfigError, CostMeter, StitchedValue, artefact
from stitchvm.core.stitching import joined
from stitchvm.core.value import Interface
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
