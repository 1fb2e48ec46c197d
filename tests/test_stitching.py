"""``stitch``: what it makes of its settings before and around stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from analytic import GaussianBackbone, LinearReward
from families import clip, mmdit
from stitchvm import core
from stitchvm.core.examples import GenerationSettings
from stitchvm.core.finetune import FinetuneSettings
from test_finetune import gaussian_images


def test_conditioning_says_what_the_head_reads_whatever_the_recipe() -> None:
    images, sampled = torch.rand(4, 3, 16, 16), FinetuneSettings(generated=0.5, steps=1, batch_size=2)
    given: dict[str, Any] = {"images": images, "interface": (1, 1), "samples": 4, "recipe": sampled, "progress": False,
                             "prompts": ["a", "b"], "generation": GenerationSettings(steps=2)}  # fmt: skip
    for conditioning, prompted in (("prompt", True), ("null", False), (None, False)):
        value = core.stitch(mmdit(), clip(), conditioning=conditioning, **given)
        assert value.prompted is prompted and (value.provenance.recipe["prompted"] > 0) is prompted
    with pytest.raises(core.ConfigError, match="the recipe takes no samples, which alone have one; set generated"):
        core.stitch(mmdit(), clip(), conditioning="prompt", **(given | {"recipe": FinetuneSettings()}))
    with pytest.raises(core.ConfigError, match="'conditioning' must be in"):
        core.stitch(mmdit(), clip(), conditioning="caption", **given)


def test_a_prompted_recipe_without_prompts_fails_before_anything_is_drawn(tmp_path: Path) -> None:
    recipe = FinetuneSettings(generated=1.0, prompted=1.0)
    with pytest.raises(core.ConfigError, match="pass prompts"):
        core.stitch(
            GaussianBackbone(), LinearReward(), images=gaussian_images(16), work=tmp_path, recipe=recipe, cuts=(2,),
            blocks=(1,), probes=16, progress=False,
        )  # fmt: skip
    assert not list(tmp_path.glob("samples-*"))


def test_a_retrained_network_of_the_same_name_gets_no_old_examples(tmp_path: Path) -> None:
    """Its caches are its own: what another network said of the images is not what it is to learn."""
    given: dict[str, Any] = {"images": torch.rand(4, 3, 16, 16), "interface": (1, 1), "progress": False,
                             "recipe": FinetuneSettings(steps=1, batch_size=2), "work": tmp_path}  # fmt: skip
    retrained = clip()
    with torch.no_grad():
        for parameter in retrained.net.parameters():
            parameter.mul_(0.5)
    for reward in (clip(), clip(), retrained):
        core.stitch(mmdit(), reward, **given)
    assert len(list(tmp_path.glob("images-*"))) == len(list(tmp_path.glob("finetune-*"))) == 2


def test_each_finetune_has_its_own_precision_in_one_process() -> None:
    given: dict[str, Any] = {"images": torch.rand(4, 3, 16, 16), "interface": (1, 1), "progress": False}
    losses = {}
    for precision in ("bf16", "no", "fp16", "again"):
        low: Any = {"mixed_precision": "no" if precision == "again" else precision}
        recipe = FinetuneSettings(steps=3, batch_size=2, learning_rate=1e-3, **low)
        losses[precision] = core.stitch(mmdit(), clip(), recipe=recipe, **given).provenance.metrics["final_loss"]
    assert losses["no"] == losses["again"] and len(set(losses.values())) == 3
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)
    assert losses["fp16"] == pytest.approx(losses["no"], rel=0.05)
