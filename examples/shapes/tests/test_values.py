"""The value models of ``examples/values``: they load onto the shipped networks, keep the skill of the clean reward and
rank the seeds of a prompt, for the sampler that they were made for."""

from pathlib import Path

import pytest

from stitchvm import core
from stitchvm.core.metrics import metric_of
from stitchvm.core.skills import SkillData
from stitchvm_shapes.world import ShapesWorld

VALUES = Path(__file__).parents[2] / "values"
KEPT = {"shapes-clip": 0.9, "shapes-hps": 0.9}
"""The least share of the clean reward's skill at sigma 0.25."""
TAPS = {"shapes-mmdit": tuple(range(1, 8)), "shapes-flux": tuple(range(1, 9)), "shapes-unet": tuple(range(1, 10))}
READY = {"shapes-mmdit": tuple(KEPT), "shapes-flux": ("shapes-clip",), "shapes-unet": tuple(KEPT)}
EMBEDDED = {"shapes-flux": 1.0}


@pytest.fixture(scope="module", params=READY)
def backbone(request) -> core.Backbone:
    return core.load_backbone(request.param).with_embedded_guidance(EMBEDDED.get(request.param))


def stitched(name: str, backbone: core.Backbone) -> core.StitchedValue:
    assert backbone.record is not None
    return core.StitchedValue.from_pretrained(
        VALUES / "unguided" / f"{backbone.record.name}--{name}", backbone=backbone
    )


def test_every_folder_is_listed_here():
    listed = {f"{backbone}--{reward}" for backbone, rewards in READY.items() for reward in rewards}
    assert {folder.name for folder in (VALUES / "unguided").iterdir()} == listed


@pytest.mark.parametrize(("backbone", "name"), [(b, r) for b in READY for r in READY[b]], indirect=["backbone"])
def test_it_keeps_the_skill_of_the_clean_reward(name, backbone):
    """Of 200 held-out captions or pairs: what is kept has a standard error of at most 2 %."""
    value = stitched(name, backbone)
    reward = value.reward(name)
    held_out = SkillData.draw(metric_of(reward), ShapesWorld(), 200, seed=11)
    skill = held_out.measure(backbone, reward, {"stitched": value}, sigmas=(0.25,), progress=False)
    assert skill.retention("stitched")[0] >= KEPT[name]


def test_they_rank_the_seeds_of_a_prompt_in_one_pass_of_the_head(backbone):
    """By the sum of a backbone's rewards, on 8 held-out prompts with 8 seeds: the mean of their rank correlations,
    which would be 0 ± 0.13 for a value that knows nothing of seeds."""
    name = backbone.record.name
    value = core.StitchedValue.together([stitched(reward, backbone) for reward in READY[name]])
    assert value.prompted and value.head.taps == TAPS[name]
    assert value.head.part.guidance == EMBEDDED.get(name)
    found = core.rank_seeds(
        backbone, {"stitched": core.Stitched(value)}, value.objective(), ShapesWorld().prompts("test", 8, 3), seeds=8,
        steps=10, guidance_scale=1.0, embedded_guidance=EMBEDDED.get(name), sigmas=(0.5,), progress=False,
    )  # fmt: skip
    assert found.report()["stitched"][0] > 0.3
