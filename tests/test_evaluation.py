"""Retrieval: recall against a formula by hand, and noise that belongs to a row rather than to a batch."""

from __future__ import annotations

import pytest
import torch

from analytic import GaussianBackbone, LinearReward
from stitchvm import core
from stitchvm.core.evaluation import Retrieval, embedding, noisy_readings, retrieval
from stitchvm.core.metrics import Recall, recall_at_one
from stitchvm.core.stitching.beginnings import initial_value


def value() -> core.StitchedValue:
    backbone, reward = GaussianBackbone(), LinearReward()
    pictures = backbone.decode_latents(backbone.draw(32, torch.Generator().manual_seed(1)))
    found = core.search(backbone, reward, images=pictures, probes=32, progress=False)
    return initial_value(backbone, reward, found, found.best)


def test_recall_counts_each_direction() -> None:
    images = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    # image to text: 0 right, 1 and 2 wrong; text to image: 0 and 2 right, 1 wrong
    recall = recall_at_one(images, texts, ["a", "b", "c"])
    assert recall.image_to_text == pytest.approx(1 / 3) and recall.text_to_image == pytest.approx(2 / 3)
    assert recall.mean == pytest.approx(0.5)


def test_rows_with_the_same_caption_are_each_others_answers() -> None:
    images, texts = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    assert recall_at_one(images, texts, ["same", "same", "c"]).mean == 1
    assert recall_at_one(images, texts, ["a", "b", "c"]).mean == pytest.approx(1 / 3)


def test_scale_of_the_embeddings_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 50, 8, generator=generator)
    names = [str(n) for n in range(50)]
    scaled = recall_at_one(images * torch.rand(50, 1), texts * 7, names)
    assert scaled == recall_at_one(images, texts, names)


def test_noise_belongs_to_the_row_not_to_the_batch() -> None:
    model, latents = value(), GaussianBackbone().draw(20, torch.Generator().manual_seed(2))
    whole, parts = (noisy_readings(model, latents, 0.5, embedding, batch=size) for size in (20, 3))
    assert torch.allclose(whole, parts, atol=1e-6)
    assert not torch.allclose(whole, noisy_readings(model, latents, 0.5, embedding, seed=1), atol=1e-2)


def test_report_gives_retention_as_a_share_of_clean() -> None:
    found = Retrieval((0.1,), Recall(0.9, 0.7), {"stitched": (Recall(0.5, 0.3),)}, 10)
    assert found.retention("stitched") == [pytest.approx(0.5)]
    report = found.report()
    assert report["clean"] == pytest.approx(0.8) and report["stitched"] == [pytest.approx(0.4)]


def test_a_reward_without_text_cannot_be_retrieved_with() -> None:
    model = value()
    with pytest.raises(core.ConfigError, match="needs a reward that reads prompts"):
        retrieval(GaussianBackbone(), LinearReward(), {"x": model}, torch.rand(2, 3, 2, 2), ["a", "b"], progress=False)
