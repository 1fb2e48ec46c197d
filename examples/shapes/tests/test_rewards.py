"""The shipped rewards, each through its registry record, and how they were trained."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import spearmanr

from stitchvm import core
from stitchvm_shapes.constants import WEIGHTS
from stitchvm_shapes.train import aesthetic, clip, dino, hps, stages
from stitchvm_shapes.train.data import Pictures, held_out
from stitchvm_shapes.train.loop import Loop, Schedule, Settings
from stitchvm_shapes.world import ShapesWorld


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return held_out(100, seed=31)


def scores(reward: core.Reward, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
    with torch.no_grad():
        return reward.rate(images / 255, reward.condition(prompts))


def test_the_aesthetic_record_says_what_it_reads_and_is_measured_by():
    reward = core.load_reward("shapes-aesthetic")
    assert core.registry().rewards["shapes-aesthetic"].metric == "rank"
    assert reward.condition_kind == "nothing"
    assert reward.preprocess(torch.rand(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_the_aesthetic_score_is_the_predictors_and_ranks_as_the_formula(pictures):
    rated = ShapesWorld().rated("test", 100, seed=5)
    found = scores(core.load_reward("shapes-aesthetic"), rated.images, None)
    model = clip.load(WEIGHTS / "shapes-clip")
    with torch.no_grad():
        seen = model.encode_image(clip.normalise(rated.images / 255))
        predicted = aesthetic.load(WEIGHTS / "shapes-clip")(seen)
    torch.testing.assert_close(found, predicted, atol=1e-4, rtol=0)
    assert spearmanr(found, rated.ratings).statistic >= 0.8
    assert float((found - rated.ratings).abs().mean()) < 1


def test_the_predictor_belongs_to_the_tower_beside_it():
    folder = WEIGHTS / "shapes-clip"
    with safe_open(folder / aesthetic.FILENAME, framework="pt") as file:
        digest = file.metadata()["tower_sha256"]
    assert digest == hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()


def test_the_preference_model_prefers_what_people_do_more_often_than_shapes_clip():
    """Of 400 held-out pairs; the accuracies differ by 0.06, of which the standard error of the difference is 0.02."""
    pairs = ShapesWorld().preferences("test", 400, seed=6)
    rates = {}
    for name in ("shapes-hps", "shapes-clip"):
        reward = core.load_reward(name)
        liked, other = (scores(reward, images, list(pairs.prompts)) for images in (pairs.preferred, pairs.rejected))
        rates[name] = float((liked > other).float().mean())
    assert core.registry().rewards["shapes-hps"].metric == "preference"
    assert rates["shapes-hps"] > 0.65
    assert rates["shapes-hps"] > rates["shapes-clip"]


def small(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    if name == "hps":
        monkeypatch.setattr(hps, "PAIRS", 2)
        return hps.HpsTask(WEIGHTS / "shapes-clip")
    if name == "dino":
        monkeypatch.setattr(dino, "SCENES", 4)
        return dino.DinoTask(WEIGHTS / "shapes-clip")
    return aesthetic.AestheticTask(WEIGHTS / "shapes-clip", held_out(20, seed=33))


@pytest.mark.parametrize("name", ["hps", "dino", "aesthetic"])
def test_an_interrupted_training_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    states = []
    for folder, stops in (("straight", (3,)), ("resumed", (1, 3))):
        for stop in stops:
            task = small(name, monkeypatch)
            Loop(task, Settings(name, tmp_path / folder, Schedule(4, warmup=1))).run(stop)
        states.append({f"{m}/{k}": v for m, module in task.modules.items() for k, v in module.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_each_scene_of_a_batch_has_a_neighbour_with_one_thing_changed():
    scenes = dino._draw(np.random.default_rng(0))
    assert len(scenes) == dino.SCENES
    for scene, changed in zip(scenes[::2], scenes[1::2], strict=True):
        assert scene != changed
        same_ground = (scene.texture, scene.background) == (changed.texture, changed.background)
        assert same_ground != (scene.things == changed.things and scene.relations == changed.relations)
    assert {scene.split for scene in scenes} == {"train"}


def test_contrast_is_the_entropy_of_finding_the_partner():
    """By hand: two orthogonal pairs, each of equals: logits 10 for the partner, 0 for the two others."""
    unit = torch.eye(2)
    expected = np.log(1 + 2 * np.exp(-1 / dino.TEMPERATURE))
    assert float(dino.contrast(unit, unit)) == pytest.approx(expected, rel=1e-3)
    assert float(dino.contrast(unit, unit.flip(0))) == pytest.approx(1 / dino.TEMPERATURE, rel=1e-2)


def test_views_keep_the_picture_but_for_a_cut_out_and_small_changes(pictures):
    wide = dino.view(pictures.images[:8] / 255, dino.VIEW, torch.Generator().manual_seed(0))
    narrow = dino.view(pictures.images[:8] / 255, (0.6, 0.8, 40), torch.Generator().manual_seed(0))
    assert wide.shape == (8, 3, 64, 64)
    assert narrow.shape == (8, 3, 40, 40)
    assert wide.min() >= 0 and wide.max() <= 1
    means = (wide.mean((2, 3)) - pictures.images[:8].div(255).mean((2, 3))).abs()
    assert means.max() < 0.2
    # Mirrored, a picture would show another relation: the cut-out correlates with the picture, not with its mirror.
    grey, there = wide.mean(1), (pictures.images[:8] / 255).mean(1)
    along, mirrored = (
        float(torch.corrcoef(torch.stack([grey.flatten(), one.flatten()]))[0, 1]) for one in (there, there.flip(-1))
    )
    assert along > mirrored


def test_probes_and_ranks_have_their_closed_forms():
    draw = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(400, 3, generator=draw), torch.randn(200, 3, generator=draw)
    known, labels = ([("low", "high")[int(x > 0)] for x in one[:, 0].tolist()] for one in (gallery, queries))
    right, chance = dino.probe_accuracy(queries, labels, gallery, known)
    assert right > 0.95
    # Of a label that the embedding says nothing of, no more is known than chance has: 4 standard errors of 1 in 2.
    blind, half = dino.probe_accuracy(queries[:, 1:], labels, gallery[:, 1:], known)
    assert abs(blind - half) < 4 * (0.5 * 0.5 / 200) ** 0.5 + abs(half - 0.5)
    assert chance == half == labels.count(max(set(known), key=known.count)) / 200
    assert dino.effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4, rel=1e-4)
    assert dino.effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1, rel=1e-4)


def test_a_new_tower_makes_what_was_trained_on_the_old_one_start_again(tmp_path):
    plan = stages.Plan(tmp_path, tmp_path)
    tower = tmp_path / "tower"
    for content, kept in ((b"old", False), (b"old", True), (b"new", False), (b"new", True)):
        tower.write_bytes(content)
        stages._forget_older(plan, "hps", tower)
        assert (tmp_path / "hps.pt").exists() == kept
        (tmp_path / "hps.pt").write_bytes(b"checkpoint")


def test_every_reward_stage_follows_shapes_clip():
    order = list(stages.STAGES)
    assert all(order.index("clip") < order.index(name) for name in ("hps", "aesthetic"))
