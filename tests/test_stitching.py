"""``stitch``: what it makes of its settings before and around stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from analytic import GaussianBackbone, LinearReward
from families import clip, flux, mmdit
from stitchvm import core
from stitchvm.core.files import make_folder, read_metadata
from stitchvm.core.stitching.examples import CleanBatch, GenerationSettings, States, from_samples
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from test_finetune import gaussian_images
from test_policy import moved
from training_worlds import LORA


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


SAMPLED = FinetuneSettings(generated=0.5, steps=1, batch_size=2)


@pytest.mark.parametrize(("build", "scale"), [(mmdit, 3.0), (flux, 1.0)])
def test_samples_are_drawn_by_its_seed_and_as_the_backbone_is_sampled(build: Any, scale: float) -> None:
    given: dict[str, Any] = {"images": torch.rand(4, 3, 16, 16), "interface": (1, 1), "samples": 4, "progress": False}
    value = core.stitch(build(), clip(), recipe=SAMPLED, prompts=["a"], seed=5, **given)
    drawn = value.provenance.examples["drawn by"]
    assert (drawn["seed"], drawn["guidance_scale"]) == (5, scale)


def test_a_finetune_goes_on_from_its_own_examples_and_start_alone(tmp_path: Path) -> None:
    """In a shared ``work``: other pictures of the same folder, other probes or another seed are another one; how often
    it is saved is not."""
    for number in range(8):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(number))
        to_pil_image(picture).save(make_folder(tmp_path / "images") / f"{number}.png")
    given: dict[str, Any] = {"images": tmp_path / "images", "interface": (1, 1), "work": tmp_path / "work",
                             "progress": False}  # fmt: skip
    once = {"count": 4, "probes": 4, "recipe": FinetuneSettings(steps=1, batch_size=2)}
    often = attrs.evolve(once["recipe"], checkpoint_every=1)  # type: ignore[type-var]
    changes: tuple[dict[str, Any], ...] = ({}, {"recipe": often}, {"count": 6}, {"probes": 8}, {"seed": 1})
    for change, expected in zip(changes, (1, 1, 2, 3, 4), strict=True):
        core.stitch(mmdit(), clip(), **{**given, **once, **change})
        assert len(list((tmp_path / "work").glob("finetune-*"))) == expected, change


def test_a_finetune_in_half_precision_goes_on_with_its_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"images": torch.rand(8, 3, 16, 16), "interface": (1, 1), "work": tmp_path,
                             "progress": False}  # fmt: skip
    recipe = FinetuneSettings(steps=2, batch_size=2, mixed_precision="fp16")
    core.stitch(mmdit(), clip(), recipe=recipe, **given)
    (state,) = tmp_path.glob("finetune-*/state.safetensors")
    kept, restored = json.loads(read_metadata(state)["scaler"]), []
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, scaling: restored.append(scaling))
    core.stitch(mmdit(), clip(), recipe=recipe, **given)
    assert kept["_growth_tracker"] == 2 and restored == [kept]


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


def drawn(prompts: list[str], samplers: list[core.Backbone], start: int = 0) -> CleanBatch:
    """The samples from number ``start`` on, of 14."""
    settings = GenerationSettings(steps=2, states=2)
    batches = list(from_samples(samplers[0], prompts, 14, 16, 5, settings, samplers[1:])(start))
    states = [batch.states for batch in batches if batch.states is not None]
    return CleanBatch(
        torch.cat([batch.latents for batch in batches]), torch.cat([batch.images for batch in batches]),
        tuple(prompt for batch in batches for prompt in batch.prompts or ()), None,
        States(torch.cat([each.latents for each in states]), states[0].sigmas),
    )  # fmt: skip


@pytest.mark.parametrize("prompts", [["a", "b"], ["a", "b", "c"]], ids=["even", "odd"])
def test_tuned_networks_take_turns_with_the_backbone(prompts: list[str], tmp_path: Path) -> None:
    """From prompt to prompt and within each, every sample as the network that has its turn draws it alone."""
    backbone = mmdit()
    tuned = core.with_lora(backbone, moved(core.Policy.of(backbone, LORA)).save(tmp_path))
    alone = [drawn(prompts, [network]) for network in (backbone, tuned)]
    mixed, later = drawn(prompts, [backbone, tuned]), drawn(prompts, [backbone, tuned], start=4)
    turns = [(n % len(prompts) + n // len(prompts)) % 2 for n in range(14)]
    assert mixed.states is not None and mixed.prompts == alone[0].prompts
    for n, turn in enumerate(turns):
        for part in ("latents", "images"):
            ours, theirs, other = (getattr(batch, part)[n] for batch in (mixed, alone[turn], alone[1 - turn]))
            torch.testing.assert_close(ours, theirs)
            assert not torch.allclose(ours, other, atol=1e-3)
        torch.testing.assert_close(mixed.states.latents[n], alone[turn].states.latents[n])  # type: ignore[union-attr]
    torch.testing.assert_close(later.latents, mixed.latents[4:])
    for number in range(len(prompts)):
        assert {turns[n] for n in range(14) if n % len(prompts) == number} == {0, 1}


def test_samples_of_loras_are_examples_of_their_own(tmp_path: Path) -> None:
    backbone = mmdit()
    lora = moved(core.Policy.of(backbone, LORA)).save(tmp_path / "lora")
    recipe = FinetuneSettings(generated=0.5, steps=1, batch_size=2)
    given: dict[str, Any] = {"images": torch.rand(4, 3, 16, 16), "interface": (1, 1), "samples": 4, "recipe": recipe,
                             "generation": GenerationSettings(steps=2), "progress": False}  # fmt: skip
    plain, mixed = (
        core.stitch(backbone, clip(), prompts=["a"], work=tmp_path / "work", loras=loras, **given).provenance.examples
        for loras in ((), (lora,))
    )
    assert "tuned" not in plain["drawn by"] and len(mixed["drawn by"]["tuned"]) == 1
    assert len(list((tmp_path / "work").glob("samples-*"))) == len(list((tmp_path / "work").glob("finetune-*"))) == 2
    with pytest.raises(core.ConfigError, match="loras take turns in drawing samples, but the recipe takes none"):
        core.stitch(backbone, clip(), loras=(lora,), **(given | {"recipe": FinetuneSettings()}))
    with pytest.raises(core.WeightsError, match="holds no LoRA"):
        core.stitch(backbone, clip(), prompts=["a"], loras=(tmp_path / "nowhere",), **given)
