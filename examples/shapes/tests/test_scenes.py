"""Scenes, captions and pictures."""

import numpy as np
import pytest
import torch

from stitchvm_shapes.render import GAP, make_split, place
from stitchvm_shapes.scenes import MAX_TOKENS, Scene, change_one, sample_scene, split_of
from stitchvm_shapes.train.clip import tokenise
from stitchvm_shapes.train.tokens import END, build_tokenizer


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_round_trip_and_stay_in_their_split(split):
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = sample_scene(rng, split)
        assert Scene.parse(scene.caption) == scene
        assert split_of(scene.caption) == split


def test_about_a_tenth_of_all_captions_is_held_out():
    rng = np.random.default_rng(1)
    held = [split_of(change_one(sample_scene(rng, "train"), rng).caption) == "test" for _ in range(3000)]
    assert 0.07 < np.mean(held) < 0.13


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on a plain gray background",
        "a large red circle",
        "a large red circle left of on a plain gray background",
    ],
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        Scene.parse(text)


def test_a_changed_scene_has_another_caption():
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = sample_scene(rng, "train")
        changed = change_one(scene, rng)
        assert changed.caption != scene.caption
        assert len(changed.things) == len(scene.things)


def test_each_word_is_one_token_and_captions_fit():
    tokenizer = build_tokenizer()
    _, captions, _ = make_split("test", 300, 3)
    ids = tokenise(tokenizer, captions)
    assert ids.shape == (300, MAX_TOKENS)
    end = tokenizer.convert_tokens_to_ids(END)
    assert end == len(tokenizer) - 1
    for row, caption in zip(ids, captions, strict=True):
        assert int((row != end).sum()) == len(caption.split()) + 1
        assert row[-1] == end


def test_places_do_not_overlap_and_stay_inside():
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene = sample_scene(rng, "train")
        spot = place(scene, rng)
        assert (spot.centres - spot.radii[:, None] >= GAP - 1e-3).all()
        assert (spot.centres + spot.radii[:, None] <= 63 - GAP + 1e-3).all()
        for a in range(len(scene.things)):
            for b in range(a):
                assert np.hypot(*(spot.centres[a] - spot.centres[b])) >= spot.radii[a] + spot.radii[b]


def test_splits_are_deterministic_in_the_seed():
    first, captions, _ = make_split("test", 40, 11)
    second, again, _ = make_split("test", 40, 11)
    other, different, _ = make_split("test", 40, 12)
    assert first.dtype == torch.uint8
    assert first.shape == (40, 3, 64, 64)
    assert torch.equal(first, second)
    assert captions == again
    assert captions != different
    assert len(set(captions)) == 40
    assert not torch.equal(first, other)


def test_the_picture_does_not_decide_the_split():
    train = set(make_split("train", 400, 0)[1])
    test = set(make_split("test", 400, 0)[1])
    assert not train & test
