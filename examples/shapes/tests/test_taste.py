"""The formula of taste and the preferences, against cases worked out by hand."""

import math

import attrs
import numpy as np
import pytest
import torch

from stitchvm.core import Preferences, Rated
from stitchvm_shapes.detector import Detector
from stitchvm_shapes.preferences import (
    BALANCE,
    BLUR,
    CHANGES,
    CLEAR,
    FOG,
    GRAIN,
    LOOK,
    TEMPERATURE,
    WRONG,
    Shot,
    balance,
    choose,
    clear_pairs,
    draw_pairs,
    utility,
    wrong_attributes,
)
from stitchvm_shapes.render import Placement
from stitchvm_shapes.scenes import Scene
from stitchvm_shapes.taste import RATING_NOISE, TERM_WEIGHTS, beauty, rate, terms
from stitchvm_shapes.world import ShapesWorld


def scene(caption: str) -> Scene:
    return Scene.parse(caption)


def placed(*centres: tuple[float, float, float]) -> Placement:
    rows = np.array(centres, np.float32)
    return Placement(rows[:, :2], rows[:, 2])


def test_the_weights_of_the_terms_sum_to_one():
    assert sum(TERM_WEIGHTS.values()) == pytest.approx(1)


def test_the_warmest_object_before_a_soft_cold_ground():
    # Orange (1.00, 0.52, 0.04) is the warmest colour and further than FARTHEST from navy (0.11, 0.14, 0.34).
    found = terms(scene("a large orange ring on a gradient navy background"))
    assert found == pytest.approx({"warmth": 1.0, "contrast": 1.0, "texture": 1.0, "harmony": 0.5, "size": 0.7})
    expected = 1 + 9 * (0.30 + 0.20 + 0.20 + 0.15 * 0.5 + 0.15 * 0.7)
    assert beauty(scene("a large orange ring on a gradient navy background")) == pytest.approx(expected)


def test_a_cold_object_that_hardly_stands_out_from_a_pattern():
    found = terms(scene("a small pink ring on a checkered beige background"))
    warmth = ((1.00 - 0.76) - (0.13 - 0.95)) / ((1.00 - 0.04) - (0.13 - 0.95))
    distance = math.sqrt(0.20**2 + 0.22**2 + 0.14**2)
    assert found == pytest.approx(
        {"warmth": warmth, "contrast": (distance - 0.3) / 0.7, "texture": 0.1, "harmony": 0.5, "size": 0.0}
    )


def test_colours_agree_by_their_distance_on_the_wheel():
    # Red lies at 359.2 degrees, blue at 230.5 and orange at 30.
    same = terms(scene("a large red ring above a large red star on a plain gray background"))
    far = terms(scene("a large red ring above a large blue star on a plain gray background"))
    assert same["harmony"] == pytest.approx(1)
    assert far["harmony"] == pytest.approx((1 + math.cos(math.radians(359.2 - 230.5))) / 2, abs=2e-3)
    three = terms(scene("a small red ring above a small red star above a small blue star on a plain gray background"))
    assert three["harmony"] == pytest.approx((1 + 2 * far["harmony"]) / 3)
    assert same["size"] == 1
    assert three["size"] == 0


def test_ratings_scatter_around_the_formula_as_much_as_is_said():
    scenes = [scene("a large red ring on a plain gray background")] * 4000
    ratings = rate(scenes, np.random.default_rng(0))
    assert ratings.mean() == pytest.approx(beauty(scenes[0]), abs=0.04)
    assert ratings.std() == pytest.approx(RATING_NOISE, rel=0.04)


ASKED = "a small red ring left of a large blue star on a plain gray background"


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (ASKED, 0),
        ("a small red ring left of a large blue star on a striped gray background", 1),
        ("a large red ring above a large blue star on a plain gray background", 2),
        ("a small blue ring left of a large red star on a plain teal background", 3),
        ("a large blue star right of a small red ring on a plain gray background", 0),
    ],
)
def test_wrong_attributes_are_counted(shown, wrong):
    assert wrong_attributes(scene(ASKED), scene(shown)) == wrong


def test_scenes_of_different_size_cannot_be_matched():
    with pytest.raises(ValueError, match="2 objects asked for and 1 shown"):
        wrong_attributes(scene(ASKED), scene("a small red ring on a plain gray background"))


def test_balance_is_the_distance_of_the_centre_of_gravity():
    assert balance(placed((31.5, 31.5, 8))) == 1
    assert balance(placed((31.5 + 8, 31.5, 8))) == pytest.approx(0.5)
    assert balance(placed((10, 31.5, 8))) == 0
    # Twice the radius weighs four times as much: 4 units left and 16 right balance.
    assert balance(placed((27.5, 31.5, 10), (47.5, 31.5, 5))) == pytest.approx(1)


def test_the_utility_adds_up():
    asked = scene("a small red ring on a plain gray background")
    shot = Shot(asked, placed((39.5, 31.5, 6)), fog=0.1, blur=0.5, grain=0.25)
    look = (beauty(asked) - 1) / 9
    expected = 0.5 * BALANCE + LOOK * look - 0.1 * FOG - 0.5 * BLUR - 0.25 * GRAIN
    assert utility(asked, shot) == pytest.approx(expected)
    other = attrs.evolve(shot, shown=attrs.evolve(asked, texture="striped"))
    # Striped instead of plain costs 0.2 of the texture's term besides.
    assert utility(asked, other) == pytest.approx(expected - WRONG - LOOK * 0.20 * 0.2)


def test_fulfilment_dominates_whatever_the_quality():
    assert WRONG > FOG + BLUR + GRAIN + BALANCE + LOOK


def test_people_choose_after_bradley_and_terry():
    utilities = torch.tensor([0.0, TEMPERATURE]).expand(20_000, 2)
    second = choose(utilities, np.random.default_rng(0)).float().mean()
    assert float(second) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_people_agree_with_the_utility_in_about_nine_pairs_of_ten():
    pairs = draw_pairs("train", 600, np.random.default_rng(1))
    gap = (pairs.utilities[:, 0] - pairs.utilities[:, 1]).abs()
    assert float((gap / TEMPERATURE).sigmoid().mean()) == pytest.approx(0.9, abs=0.02)
    assert float((pairs.wrong == 0).float().mean()) == pytest.approx(CHANGES[0], abs=0.06)


def test_prompts_belong_to_the_split_and_no_held_out_scene_is_shown_in_training():
    pairs = draw_pairs("train", 60, np.random.default_rng(2))
    assert {scene(caption).split for caption in [*pairs.captions, *pairs.shown]} == {"train"}
    held = draw_pairs("test", 60, np.random.default_rng(2))
    assert {scene(caption).split for caption in held.captions} == {"test"}


def test_preferences_are_the_clear_pairs_with_the_better_one_first():
    preferences = ShapesWorld().preferences("test", 40, seed=3)
    assert isinstance(preferences, Preferences)
    assert preferences.preferred.shape == preferences.rejected.shape == (40, 3, 64, 64)
    assert preferences.preferred.dtype == torch.uint8
    # The same draws again: pairs in their order, with their utilities.
    pairs = draw_pairs("test", 50, np.random.default_rng((3, 3)))
    gaps = (pairs.utilities[:, 0] - pairs.utilities[:, 1]).abs()
    clear = [n for n in range(50) if gaps[n] >= CLEAR][:40]
    assert 0 < len(clear) < 50
    assert preferences.prompts[: len(clear)] == [pairs.captions[n] for n in clear]
    for row, n in enumerate(clear):
        assert torch.equal(preferences.preferred[row], pairs.images[n, int(pairs.utilities[n].argmax())])
        assert torch.equal(preferences.rejected[row], pairs.images[n, int(pairs.utilities[n].argmin())])
    # And as an independent judge sees it: whatever is preferred fulfils its prompt more often.
    judge = Detector.load()
    rates = [
        judge.fulfilled(images / 255, preferences.prompts).float().mean()
        for images in (preferences.preferred, preferences.rejected)
    ]
    assert rates[0] > rates[1] + 0.2


def test_no_pairs_are_asked_for_and_none_are_given():
    preferred, rejected, prompts = clear_pairs("test", 0)
    assert len(preferred) == len(rejected) == len(prompts) == 0
    with pytest.raises(ValueError, match="negative"):
        clear_pairs("test", -1)


def test_rated_scenes_carry_the_formula():
    rated = ShapesWorld().rated("test", 20, seed=1)
    again = ShapesWorld().rated("test", 20, seed=1)
    assert isinstance(rated, Rated)
    assert rated.images.shape == (20, 3, 64, 64)
    assert torch.equal(rated.images, again.images)
    assert torch.equal(rated.ratings, again.ratings)
    assert rated.ratings.min() >= 1 and rated.ratings.max() <= 10
    captions = ShapesWorld().captioned("test", 20, seed=2_001).captions
    assert rated.ratings.tolist() == pytest.approx([beauty(scene(caption)) for caption in captions])
