"""Stage 2: the trained value is ``E[r(z0) | z_t]`` where that is known, and a killed run ends in the same weights."""

from __future__ import annotations

import time
from pathlib import Path

import attrs
import pytest
import torch

import killing
from analytic import GaussianBackbone, LinearReward, MomentReward, QuadraticReward
from families import clip
from stitchvm import core
from stitchvm.core.files import read_tensors, write_tensors
from stitchvm.core.images import open_images
from stitchvm.core.reward import RewardOutput
from stitchvm.core.stitching.batches import GROUP, Batches, draw_sigma, join_sources
from stitchvm.core.stitching.beginnings import initial_value
from stitchvm.core.stitching.examples import (
    CleanBatch,
    Examples,
    GenerationSettings,
    build_examples,
    from_images,
    from_samples,
)
from stitchvm.core.stitching.finetune import finetune
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from stitchvm.core.stitching.objectives import distillation_loss, predicted_score

ANALYTIC = FinetuneSettings(
    steps=700, batch_size=256, learning_rate=2e-3, layer_multiplier=5.0, warmup_steps=10, schedule="cosine",
    noise="uniform", embedding_weight=0, token_weight=0, clip_norm=100.0,
)  # fmt: skip


def gaussian_images(count: int, seed: int = 0) -> list[torch.Tensor]:
    backbone = GaussianBackbone()
    return list(backbone.decode_latents(backbone.draw(count, torch.Generator().manual_seed(seed))))


def examples(folder: Path, reward: MomentReward, count: int) -> Examples:
    backbone = GaussianBackbone()
    latents = from_images(backbone, open_images(gaussian_images(count)), count, 2, 512)
    return build_examples(
        folder, latents, {type(reward).__name__: reward}, {"count": count}, count, label="x", progress=False
    )


def untrained(reward: MomentReward, interface: tuple[int, int] = (2, 1)) -> core.StitchedValue:
    backbone = GaussianBackbone()
    found = core.search(
        backbone,
        reward,
        images=gaussian_images(64, 9),
        cuts=interface[:1],
        blocks=interface[1:],
        probes=64,
        progress=False,
    )
    return initial_value(backbone, reward, found, found.best)


@pytest.mark.parametrize("reward", [LinearReward(), QuadraticReward()], ids=["linear", "quadratic"])
def test_the_trained_value_is_the_conditional_expectation(tmp_path: Path, reward: MomentReward) -> None:
    """At every sigma: root mean square error below 10 % of the reward's standard deviation.

    The clean rewards of the 8,192 examples scatter around E[r | z_t], so a fit of the layer's few hundred parameters
    can be off by about sqrt(300 / 8192) = 19 % of that scatter where it is worst and sees least of it elsewhere; the
    bound is half of that, and a value that ignores z_t (error 100 %), the posterior variance (quadratic, sigma > 0.5:
    over 40 %) or the noise level fails it.
    """
    torch.manual_seed(0)
    value = untrained(reward)
    finetune(value, examples(tmp_path / "cache", reward, 8192), ANALYTIC, progress=False)
    backbone = GaussianBackbone()
    clean = backbone.draw(2000, torch.Generator().manual_seed(5))
    scale = float(reward.expectation(clean, 0.0).std())
    for sigma in (0.05, 0.25, 0.5, 0.75, 0.95):
        noisy = backbone.path.add_noise(
            clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(6)), sigma
        )
        truth = reward.expectation(*backbone.posterior(noisy, sigma))
        with torch.no_grad():
            error = float((value(noisy, sigma) - truth).square().mean().sqrt())
        assert error < 0.1 * scale, f"sigma {sigma}: {error:.4f} against {scale:.4f}"


def test_gradients_reach_the_latents_and_agree_with_the_truth(tmp_path: Path) -> None:
    reward = LinearReward()
    value = untrained(reward)
    finetune(value, examples(tmp_path / "cache", reward, 4096), ANALYTIC, progress=False)
    backbone = GaussianBackbone()
    latents = backbone.draw(64, torch.Generator().manual_seed(2)).requires_grad_()
    learned = torch.autograd.grad(value(latents, 0.5).sum(), latents)[0]
    exact = torch.autograd.grad(reward.expectation(*backbone.posterior(latents, 0.5)).sum(), latents)[0]
    assert torch.cosine_similarity(learned.flatten(), exact.flatten(), dim=0) > 0.95


def test_the_mix_draws_its_share_of_generated_latents(tmp_path: Path) -> None:
    reward, backbone = LinearReward(), GaussianBackbone()
    drawn = from_samples(backbone, ["5"], 300, 2, 64, GenerationSettings(steps=4, guidance_scale=1.0))
    name = type(reward).__name__
    samples = build_examples(tmp_path / "s", drawn, {name: reward}, {}, 300, label="s", progress=False)
    real = examples(tmp_path / "r", reward, 300)
    batch = Batches.of(backbone, real, samples, FinetuneSettings(batch_size=400, generated=0.75))(0)
    shifted = batch[f"{name}/score"] > 0.75 * 5 / 2  # prompt "5" lifts the linear reward by 0.75 * 5
    assert int(shifted.sum()) == 300


class Lossy(GaussianBackbone):
    """An autoencoder that loses something: what it decodes is a tenth darker."""

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode_latents(latents) - 0.1


def test_a_share_of_the_images_is_judged_as_decoded() -> None:
    images = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    produce = from_images(Lossy(), open_images(list(images)), 10, 2, 4, decoded=0.5)
    for start in (0, 3):  # resumed in the middle, the same images are decoded
        judged = torch.cat([batch.images for batch in produce(start)])
        darker = (judged - images[start:]).mean((1, 2, 3))
        torch.testing.assert_close(darker, torch.tensor([0.0, -0.1] * 5)[start:], rtol=0, atol=1e-6)


def test_a_mix_without_samples_is_an_error(tmp_path: Path) -> None:
    reward = LinearReward()
    with pytest.raises(core.ConfigError, match="75% of its latents from generated samples"):
        finetune(untrained(reward), examples(tmp_path, reward, 300), FinetuneSettings(generated=0.75), progress=False)


def own_samples(folder: Path, reward: MomentReward, count: int, states: int, seed: int = 0) -> Examples:
    """The Gaussian backbone's own unguided samples of the null prompt, with ``states`` of their trajectories."""
    settings = GenerationSettings(steps=32, guidance_scale=1.0, seed=seed, states=states)
    drawn = from_samples(GaussianBackbone(), [""], count, 2, 512, settings)
    return build_examples(folder, drawn, {type(reward).__name__: reward}, {}, count, label="own", progress=False)


def test_states_of_the_sampler_are_kept_with_their_levels(tmp_path: Path) -> None:
    samples = own_samples(tmp_path, LinearReward(), 600, states=4).read(range(600))
    assert samples["states"].shape == (600, 4, 3, 2, 2)
    assert torch.equal(samples["state_sigmas"][0], torch.tensor([1.0, 0.75, 0.5, 0.25]))
    backbone, null = GaussianBackbone(), GaussianBackbone().null_condition()
    resumed = core.sample(core.Denoiser(backbone, null, null), samples["states"][:, 2], torch.linspace(0.5, 0, 17))
    # kept in half precision: 2 ** -11 relative
    torch.testing.assert_close(resumed, samples["latents"], rtol=0, atol=5e-3)


@pytest.mark.parametrize("on_policy", [1.0, 0.0])
def test_states_of_the_sampler_teach_what_becomes_of_them(tmp_path: Path, on_policy: float) -> None:
    """An ODE leaves no doubt what a state becomes, ``r(z0(z_t))``; noised again, a sample is only expected to.

    In this world the two differ by the slopes ``s / sqrt(v)`` and ``(1 - t) s^2 / v`` of ``z0``, with ``v = (1 - t)^2
    s^2 + t^2``: 1.25 and 0.78 at t = 0.5, which is 37 % of the reward's standard deviation.
    """
    reward = LinearReward()
    torch.manual_seed(0)
    value = untrained(reward)
    samples = own_samples(tmp_path / "train", reward, 4096, states=16)
    finetune(value, None, attrs.evolve(ANALYTIC, generated=1.0, on_policy=on_policy), samples=samples, progress=False)
    fresh = own_samples(tmp_path / "test", reward, 512, states=16, seed=1).read(range(512))
    truth = fresh["LinearReward/score"]
    with torch.no_grad():
        read = value(fresh["states"][:, 8], 0.5)
    error = float((read - truth).square().mean().sqrt() / truth.std())
    assert error < 0.1 if on_policy else 0.3 < error < 0.45


def test_seeds_of_one_prompt_are_read_at_one_level(tmp_path: Path) -> None:
    backbone, reward = GaussianBackbone(), LinearReward()
    drawn = from_samples(backbone, ["1", "2", "3"], 60, 2, 20, GenerationSettings(steps=4, states=2))
    samples = build_examples(tmp_path, drawn, {"r": reward}, {}, 60, label="s", progress=False)
    recipe = FinetuneSettings(batch_size=32, generated=1.0, on_policy=0.5, seeds_per_prompt=4, rank_weight=1.0)
    batch = Batches.of(backbone, None, samples, recipe)(3)
    prompt = samples.column("prompt")
    assert prompt is not None
    scores = samples.column("r/score")
    assert scores is not None
    for number in range(8):
        of_group = batch[GROUP] == number
        assert int(of_group.sum()) == 4
        assert batch["sigma"][of_group].unique().numel() == 1
        rows = [int((scores == score).nonzero()) for score in batch["r/score"][of_group]]
        assert len(set(rows)) == 4 and prompt[rows].unique().numel() == 1
    # half of the groups sit on the sampler's own two levels, the others on levels of their own
    assert int(torch.isin(batch["sigma"], torch.tensor([1.0, 0.5])).sum()) == 16


def test_too_few_seeds_of_a_prompt_are_an_error(tmp_path: Path) -> None:
    samples = own_samples(tmp_path, LinearReward(), 3, states=0)
    recipe = FinetuneSettings(generated=1.0, seeds_per_prompt=4)
    with pytest.raises(core.ConfigError, match="compares 4 seeds of a prompt, but the samples hold 0"):
        finetune(untrained(LinearReward()), None, recipe, samples=samples, progress=False)


def test_a_prompted_head_reads_what_the_sample_was_drawn_for(tmp_path: Path) -> None:
    """Prompt "2" moves the latents' mean by 2: under it the posterior, and with it the value, is another one.

    Each prompt has a quarter as many examples as the unprompted case above, which doubles its bound of 10 %; reading
    the null prompt instead is off by more than the whole standard deviation of the reward.
    """
    backbone, reward = GaussianBackbone(), LinearReward()
    torch.manual_seed(0)
    value = untrained(reward)
    value.prompted = True
    drawn = from_samples(backbone, ["0", "2"], 4096, 2, 512, GenerationSettings(steps=32, guidance_scale=1, states=0))
    samples = build_examples(tmp_path, drawn, {"LinearReward": reward}, {}, 4096, label="s", progress=False)
    recipe = attrs.evolve(ANALYTIC, generated=1.0, prompted=1.0)
    with pytest.raises(core.ConfigError, match="pass prompts"):
        finetune(value, None, recipe, samples=samples, progress=False)
    finetune(value, None, recipe, samples=samples, prompts=backbone.encode_prompts(["0", "2"]), progress=False)
    noise = torch.Generator().manual_seed(3)
    for sigma in (0.25, 0.5, 0.75):
        for shift in (0.0, 2.0):
            clean = backbone.draw(1000, noise, shift)
            noisy = backbone.path.add_noise(clean, torch.randn(clean.shape, generator=noise), sigma)
            truth = reward.expectation(*backbone.posterior(noisy, sigma, shift))
            with torch.no_grad():
                read = value(noisy, sigma, prompt=backbone.encode_prompts([f"{shift:g}"]))
            error = float((read - truth).square().mean().sqrt() / reward.expectation(clean, 0.0).std())
            assert error < 0.2, (sigma, shift, error)


def test_a_recipe_without_kept_states_is_an_error(tmp_path: Path) -> None:
    reward = LinearReward()
    samples = own_samples(tmp_path, reward, 300, states=0)
    recipe = FinetuneSettings(generated=1.0, on_policy=0.5)
    with pytest.raises(core.ConfigError, match="kept no states"):
        finetune(untrained(reward), None, recipe, samples=samples, progress=False)


def test_logit_normal_is_centre_biased() -> None:
    draws = draw_sigma("logit-normal", 20_000, torch.Generator().manual_seed(0))
    middle = float(((draws > 0.25) & (draws < 0.75)).float().mean())
    # P(|N(0, 1)| < log 3) = 0.728; three standard errors of a share of 20,000 are 0.0095
    assert abs(middle - 0.728) < 0.0095


def test_a_cache_resumes_and_refuses_other_settings(tmp_path: Path) -> None:
    reward, backbone = LinearReward(), GaussianBackbone()
    whole = examples(tmp_path / "whole", reward, 700)
    calls: list[int] = []

    def interrupted(start: int):  # type: ignore[no-untyped-def]
        calls.append(start)
        for number, batch in enumerate(from_images(backbone, open_images(gaussian_images(700)), 700, 2, 64)(start)):
            if len(calls) == 1 and number == 6:
                raise KeyboardInterrupt
            yield batch

    rewards = {type(reward).__name__: reward}
    with pytest.raises(KeyboardInterrupt):
        build_examples(tmp_path / "cut", interrupted, rewards, {"count": 700}, 700, label="x", progress=False)
    resumed = build_examples(tmp_path / "cut", interrupted, rewards, {"count": 700}, 700, label="x", progress=False)
    assert calls == [0, 256] and len(resumed) == len(whole) == 700
    rows = [0, 255, 256, 699, 3]
    assert all(torch.equal(resumed.read(rows)[k], v) for k, v in whole.read(rows).items())
    with pytest.raises(core.ArtefactError, match="other settings"):
        build_examples(tmp_path / "cut", interrupted, rewards, {"count": 9}, 9, label="x", progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    reward = LinearReward()
    value, data = untrained(reward), examples(tmp_path / "cache", reward, 300)
    recipe = FinetuneSettings(steps=4, batch_size=8, checkpoint_every=1, warmup_steps=0)
    finetune(value, data, recipe, checkpoint=tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "state.safetensors").read_bytes()
    with torch.no_grad():
        value.branches[0].layer.linear.weight.fill_(float("nan"))
    wild = FinetuneSettings(steps=4, batch_size=8, checkpoint_every=1, warmup_steps=0)
    with pytest.raises(core.NonFiniteError, match="lower the learning rate"):
        finetune(value, data, wild, checkpoint=tmp_path / "other", progress=False)
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == before
    assert not (tmp_path / "other" / "state.safetensors").exists()


def to_be_killed(folder: Path) -> None:
    reward, read = LinearReward(), Examples.read
    data = examples(folder / "cache", reward, 300)
    Examples.read = lambda self, rows: (time.sleep(0.02), read(self, rows))[1]  # type: ignore[method-assign]
    value = untrained(reward)
    recipe = FinetuneSettings(steps=40, batch_size=16, learning_rate=1e-3, warmup_steps=5, checkpoint_every=3)
    finetune(value, data, recipe, checkpoint=folder / "run", progress=False)
    write_tensors(folder / "final.safetensors", value.branches.state_dict())


def test_killed_at_five_random_moments_and_resumed_ends_in_the_same_weights(tmp_path: Path) -> None:
    folders = killing.whole_and_killed(
        "test_finetune", "to_be_killed", tmp_path, state="run/state.safetensors", final="final.safetensors", within=0.08
    )
    expected, found = (read_tensors(folder / "final.safetensors") for folder in folders)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    reward = LinearReward()
    data = examples(tmp_path / "cache", reward, 300)
    finetune(
        untrained(reward), data, FinetuneSettings(steps=2, batch_size=8), checkpoint=tmp_path / "run", progress=False
    )
    with pytest.raises(core.ArtefactError, match="another recipe"):
        finetune(
            untrained(reward),
            data,
            FinetuneSettings(steps=3, batch_size=8),
            checkpoint=tmp_path / "run",
            progress=False,
        )


def prompted_batch(count: int, prompts: tuple[str, ...] | None) -> CleanBatch:
    draw = torch.Generator().manual_seed(count)
    images = torch.rand(count, 3, 28, 28, generator=draw)
    return CleanBatch(torch.randn(count, 4, 4, 4, generator=draw), images, prompts)


def test_samples_drawn_for_a_prompt_are_scored_against_it(tmp_path: Path) -> None:
    reward, batch = clip(), prompted_batch(3, ("a red cat", "a dog", "a red cat"))
    cache = build_examples(tmp_path, lambda start: iter([batch]), {"clip": reward}, {}, 3, label="x", progress=False)
    kept = cache.read([2, 0])
    image = torch.nn.functional.normalize(reward.judge(batch.images).embedding, dim=-1)
    text = reward.encode_prompts(list(batch.prompts or ()))["text"]
    assert torch.allclose(kept["clip/score"], (image * text).sum(1)[[2, 0]], atol=1e-6)
    assert torch.equal(kept["clip/condition.text"], text[[2, 0]])


def test_only_the_examples_with_a_score_are_held_to_one(tmp_path: Path) -> None:
    """Photographs mixed with prompted samples: the score's loss is that of the samples alone, its gradient finite."""
    reward = clip()
    caches = [
        build_examples(
            tmp_path / str(k), lambda start, batch=batch: iter([batch]), {"clip": reward}, {}, len(batch.latents),
            label="x", progress=False,
        )
        for k, batch in enumerate([prompted_batch(4, None), prompted_batch(2, ("a cat", "a dog"))])
    ]  # fmt: skip
    parts = [caches[0].read(range(4)), caches[1].read(range(2))]
    joined = join_sources([{"noisy": part["latents"], **part} for part in parts])
    target = {name.removeprefix("clip/"): tensor for name, tensor in joined.items()}
    output = reward.judge(torch.rand(6, 3, 28, 28, generator=torch.Generator().manual_seed(9)))
    embedding = output.embedding.clone().requires_grad_()
    predicted = predicted_score(reward, RewardOutput(output.tokens, embedding), target)
    assert predicted is not None and predicted.shape == (2,)
    only_score = FinetuneSettings(embedding_weight=0, token_weight=0, score_weight=3)
    loss = distillation_loss(RewardOutput(output.tokens, embedding), target, only_score, predicted)
    unit = torch.nn.functional.normalize(output.embedding[4:], dim=-1)
    errors = (unit * target["condition.text"][4:]).sum(1) - target["score"][4:]
    assert torch.allclose(loss, 3 * errors.square().mean(), atol=1e-6)
    gradient = torch.autograd.grad(loss, embedding)[0]
    assert not gradient[:4].any() and bool(gradient[4:].any()) and bool(gradient.isfinite().all())
