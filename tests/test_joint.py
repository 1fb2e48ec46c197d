"""Several rewards over one head: a weighted sum, one search, one artefact, and one joint reward to steer by."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from analytic import GaussianBackbone, LinearReward, QuadraticReward, exact_stitched
from stitchvm import core
from stitchvm.core import Condition, ConfigError, CostMeter, JointReward, StitchedValue, artefact, evaluation
from stitchvm.core.branch import Interface
from stitchvm.core.joint import load_judge
from stitchvm.core.stitching.beginnings import joined
from stitchvm.core.stitching.examples import Examples
from stitchvm.core.stitching.finetune_settings import FinetuneSettings

DFN, HPS, AESTHETIC, DINO = "dfn-clip-vit-h-14-378", "hpsv2", "aesthetic", "dinov2-vit-l-14"
PROMPTS = ["a red circle", "a blue star", "nothing"]
SHORT = FinetuneSettings(steps=2, batch_size=4, warmup_steps=0, learning_rate=1e-3)


@cache
def twin(name: str) -> core.Reward:
    return core.build_twin(core.registry().reward(name))


@cache
def sd3() -> core.Backbone:
    return core.build_twin(core.registry().backbone("sd3.5-medium"))


def pictures(side: int = 16, count: int = 8) -> list[Tensor]:
    return list(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)))


PROBES: dict[str, Any] = {"images": pictures(), "probes": 8, "resolution": 16, "progress": False}


@pytest.fixture(scope="module")
def backbone() -> core.Backbone:
    return sd3()


@pytest.fixture(scope="module")
def rewards() -> dict[str, core.Reward]:
    return {name: twin(name) for name in (DFN, HPS)}


@pytest.fixture(scope="module")
def found(backbone: core.Backbone, rewards: dict[str, core.Reward]) -> core.JointSearch:
    return core.search_jointly(backbone, list(rewards.values()), **PROBES)


@pytest.fixture
def latents(backbone: core.Backbone) -> Tensor:
    x, _ = backbone.example(3)
    return torch.randn(x.latents.shape, generator=torch.Generator().manual_seed(1))


def alone(value: StitchedValue, name: str) -> StitchedValue:
    """One branch of a value as a value of its own."""
    branch = value.branches[value.names.index(name)]
    return StitchedValue(value.head, {name: branch}, value.null, rewards={name: value.reward(name)})


@cache
def made(names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> StitchedValue:
    """An untrained value of several rewards, cut after block 2 and before blocks 1, 2, 1, .."""
    rewards = {name: twin(name) for name in names}
    found = core.search_jointly(sd3(), rewards, cuts=(2,), blocks=(1, 2), **PROBES)
    cuts = {name: Interface(2, 1 + n % 2) for n, name in enumerate(names)}
    return joined(sd3(), rewards, found.results, cuts, weights)


# -- the value --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_value_is_the_weighted_sum_of_its_branches_in_one_head_pass(backbone, latents) -> None:
    value = made((DFN, HPS, AESTHETIC), (2.0, -0.5, 0.25))
    sigma = torch.tensor([0.1, 0.5, 0.9])
    with CostMeter() as cost:
        whole = value(latents, sigma, PROMPTS)
    assert dict(cost.passes) == {"head": 3, "tail": 9}
    parts = [alone(value, DFN)(latents, sigma, PROMPTS), alone(value, HPS)(latents, sigma, PROMPTS),
             alone(value, AESTHETIC)(latents, sigma)]  # fmt: skip
    assert torch.equal(whole, torch.stack([2.0 * parts[0], -0.5 * parts[1], 0.25 * parts[2]]).sum(0))
    assert float(torch.stack(parts).std(0).min()) > 1e-3, "the branches differ"


def test_gradients_are_the_weighted_sum_too(backbone, latents) -> None:
    value = made((DFN, HPS), (1.0, 3.0))
    latents.requires_grad_()
    whole, first, second = (
        torch.autograd.grad(model(latents, 0.5, PROMPTS).sum(), latents)[0]
        for model in (value, alone(value, DFN), alone(value, HPS))
    )
    torch.testing.assert_close(whole, first + 3 * second)


@torch.no_grad()
def test_prompts_once_a_mapping_and_a_ready_condition_are_the_same(backbone, latents) -> None:
    value = made((DFN, HPS, AESTHETIC))
    once = value(latents, 0.5, PROMPTS)
    ready = {name: value.reward(name).condition(PROMPTS) for name in (DFN, HPS)}
    packed = value.objective().condition(PROMPTS)
    assert set(packed.tensors) == {f"{DFN}/text", f"{HPS}/text"}
    for given in ({DFN: PROMPTS, HPS: PROMPTS}, ready, {**ready, AESTHETIC: None}, packed):
        assert torch.equal(value(latents, 0.5, given), once)
    other = {DFN: PROMPTS, HPS: PROMPTS[::-1]}
    assert not torch.equal(value(latents, 0.5, other), once), "each reward reads its own"


@torch.no_grad()
def test_prompts_and_reference_images_together(backbone, latents) -> None:
    value = made((HPS, DINO))
    references = list(torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(3)))
    given = {HPS: PROMPTS, DINO: references}
    expected = alone(value, HPS)(latents, 0.5, PROMPTS) + alone(value, DINO)(latents, 0.5, references)
    assert torch.equal(value(latents, 0.5, given), expected)
    packed = value.objective().condition(given)
    assert len(packed) == 3, "one sample's references serve every prompt"
    torch.testing.assert_close(value(latents, 0.5, packed), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "needs a condition .prompts., none was given"),
        ("a cat", "single string"),
        ({DFN: ["a"]}, f"given for {DFN}; needed by {DFN}, {HPS}"),
        ({DFN: ["a"], HPS: ["a"], "clip": ["a"]}, "Give one for each of those and no other"),
        ({DFN: ["a"], HPS: None}, "needs a condition .prompts., none was given"),
        (Condition({"text": torch.ones(1, 12)}), f"holds 'text', which belongs to none of {DFN}, {HPS}"),
        (Condition({f"{DFN}/text": torch.ones(1, 12)}), "the condition holds nothing"),
        (Condition({f"{DFN}/text": torch.ones(1, 12), f"{HPS}/text": torch.ones(1, 12), "x/text": torch.ones(1, 12)}),
         "holds 'x/text'"),
        ([torch.rand(3, 8, 8)], "list of at least one prompt"),
    ],
)  # fmt: skip
def test_a_missing_or_surplus_condition_is_an_error(backbone, latents, given, said) -> None:
    value = made((DFN, HPS))
    with pytest.raises(ConfigError, match=said):
        value(latents, 0.5, given)


def test_prompts_are_surplus_where_no_reward_reads_them(backbone, latents) -> None:
    with pytest.raises(ConfigError, match="leave the condition out"):
        made((AESTHETIC,))(latents, 0.5, PROMPTS)
    with pytest.raises(ConfigError, match="needs a condition .images., none was given"):
        made((HPS, DINO))(latents, 0.5, PROMPTS)


@pytest.mark.parametrize(
    ("rewards", "settings", "said"),
    [
        ([DFN, HPS], {"weights": [1.0]}, f"2 rewards .{DFN}, {HPS}. but 1 weights"),
        ([DFN, HPS], {"weights": []}, "but 0 weights"),
        ([DFN, HPS], {"weights": [1.0, float("nan")]}, "finite"),
        ([DFN, DFN], {}, f"{DFN!r} is given twice"),
        ([], {}, "no reward was given"),
        ([DFN, HPS], {"interface": (2, 1)}, "one block for each of"),
        ([DFN], {"interface": (2, 1, 1)}, "one block for each of"),
    ],
)  # fmt: skip
def test_a_mistake_in_what_is_joined_is_one_clear_error(backbone, tmp_path, rewards, settings, said) -> None:
    given = [twin(name) for name in rewards]
    with pytest.raises(ConfigError, match=said):
        core.stitch(backbone, given, work=tmp_path, recipe=SHORT, **PROBES, **settings)
    assert not list(tmp_path.iterdir()), "nothing was searched or cached for it"


def test_a_joint_reward_brings_its_weights(backbone, rewards, tmp_path) -> None:
    joint = JointReward(rewards, [1, 0.5])
    settings: dict[str, Any] = {"work": tmp_path, "recipe": SHORT, "interface": (2, 1, 1), **PROBES}
    assert core.stitch(backbone, joint, **settings).weights == (1.0, 0.5)
    assert core.stitch(backbone, joint, weights=[3, 3], **settings).weights == (3.0, 3.0)


def test_an_earlier_search_must_be_for_the_same_rewards(backbone, found, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"the search was for {DFN}, but the value is for {DFN}, {HPS}"):
        core.stitch(backbone, [twin(DFN), twin(HPS)], images=pictures(), work=tmp_path, searched=found.results[DFN])


@pytest.mark.parametrize(
    "given", [{"cuts": (2,)}, {"blocks": (1,), "taps": (1,)}, {"criterion": "mse", "probes": 8}], ids="-".join
)
def test_what_was_searched_is_not_chosen_again(backbone, found, tmp_path, given) -> None:
    with pytest.raises(ConfigError, match=f"stitch takes {', '.join(given)} from searched; leave out"):
        core.stitch(
            backbone, twin(DFN), images=torch.rand(4, 3, 16, 16), work=tmp_path, searched=found.results[DFN], **given
        )
    assert not list(tmp_path.iterdir())


# -- search -----------------------------------------------------------------------------------------------------------


def test_each_reward_is_judged_as_it_is_alone(backbone, rewards, found) -> None:
    for name, reward in rewards.items():
        single = core.search(backbone, reward, **PROBES)
        assert single.losses == found.results[name].losses


def test_the_common_head_has_the_lowest_sum_of_each_rewards_best(backbone, found) -> None:
    first, second = (result.loss for result in found.results.values())
    cuts = range(1, backbone.depth + 1)
    sums = {i: min(first[i, j] for j in (1, 2, 3)) + min(second[i, j] for j in (1, 2, 3)) for i in cuts}
    assert found.loss == pytest.approx(sums)
    best = min(sums, key=sums.__getitem__)
    for name, result in found.results.items():
        cut = found.best[name]
        assert cut.i == best
        assert result.loss[cut.i, cut.j] == min(result.loss[best, j] for j in result.blocks)


def test_the_sum_decides_and_not_the_first_reward() -> None:
    """Cut 1 is best for one reward and 2 for the other; 3, second best for both, has the lowest sum."""

    def result(name: str, losses: dict[int, tuple[float, float]]) -> core.SearchResult:
        table: Any = {(i, j): loss for i, row in losses.items() for j, loss in enumerate(row, start=1)}
        return core.SearchResult("b", name, "mse", (1, 2), {"mse": table}, dict.fromkeys(losses), {}, 8)  # type: ignore[arg-type]

    one = result("one", {1: (0.1, 0.2), 2: (0.9, 0.8), 3: (0.3, 0.2)})
    two = result("two", {1: (0.9, 0.7), 2: (0.05, 0.3), 3: (0.1, 0.2)})
    joint = core.JointSearch({"one": one, "two": two})
    assert joint.loss == pytest.approx({1: 0.8, 2: 0.85, 3: 0.3})
    assert {name: (cut.i, cut.j) for name, cut in joint.best.items()} == {"one": (3, 2), "two": (3, 1)}
    report = joint.report()
    assert report["best"] == {"i": 3, "j": {"one": 2, "two": 1}}
    assert [each["reward"] for each in report["rewards"]] == ["one", "two"]


def test_the_backbone_is_passed_once_for_all(backbone, rewards) -> None:
    with CostMeter() as both:
        core.search_jointly(backbone, rewards, **PROBES)
    with CostMeter() as one:
        core.search(backbone, rewards[DFN], **PROBES)
    assert both.passes["encoder"] == one.passes["encoder"] > 0


# -- stitch and artefact ----------------------------------------------------------------------------------------------


def test_stitch_saves_all_branches_in_one_artefact(backbone, rewards, latents, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(artefact, "load_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr(artefact, "load_reward", lambda name, **_: rewards[name])
    before = made((DFN, HPS))
    value = core.stitch(
        backbone, list(rewards.values()), weights=[1, 0.5], out=tmp_path / "value", recipe=SHORT, interface=(2, 1, 2),
        **PROBES,
    )  # fmt: skip
    assert [(value.interface(name).i, value.interface(name).j) for name in value.names] == [(2, 1), (2, 2)]
    for old, new in zip(before.branches, value.branches, strict=True):
        moved = (old.layer.linear.weight - new.layer.linear.weight).detach().abs().max()
        assert 0 < float(moved) < 0.05, "both branches were trained, from the closed form"
    again = StitchedValue.from_pretrained(tmp_path / "value")
    with torch.no_grad():
        assert torch.equal(again(latents, 0.3, PROMPTS), value(latents, 0.3, PROMPTS))
    assert (again.names, again.weights) == ((DFN, HPS), (1.0, 0.5))
    config = json.loads((tmp_path / "value/config.json").read_text())
    assert [(s["name"], s["j"], s["weight"]) for s in config["stitches"]] == [(DFN, 1, 1.0), (HPS, 2, 0.5)]
    card = (tmp_path / "value/README.md").read_text()
    assert f"{DFN} + 0.5 {HPS}" in card
    assert "apple-ascl" in card


def test_the_examples_hold_the_targets_of_all_and_training_goes_on_from_them(backbone, rewards, tmp_path) -> None:
    settings: dict[str, Any] = {"work": tmp_path, "recipe": SHORT, "interface": (2, 1, 1), **PROBES}
    first = core.stitch(backbone, list(rewards.values()), **settings)
    (cache,) = tmp_path.glob("images-*")
    columns = Examples(cache, 8).read([0, 7])
    assert {name.rpartition("/")[0] for name in columns} == {"", DFN, HPS}
    with CostMeter() as cost:
        second = core.stitch(backbone, list(rewards.values()), **settings)
    assert cost.passes["reward"] == 0
    pairs = zip(first.branches.parameters(), second.branches.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# -- steering ---------------------------------------------------------------------------------------------------------


def gaussian() -> tuple[GaussianBackbone, StitchedValue, LinearReward, QuadraticReward]:
    backbone, linear, quadratic = GaussianBackbone(), LinearReward(), QuadraticReward()
    parts = [exact_stitched(backbone, reward) for reward in (linear, quadratic)]
    branches = {part.names[0]: part.branches[0] for part in parts}
    rewards = {"LinearReward": linear, "QuadraticReward": quadratic}
    value = StitchedValue(parts[0].head, branches, backbone.null_condition(), [2.0, 0.5], rewards)
    return backbone, value, linear, quadratic


def test_a_joint_value_is_the_expectation_of_the_weighted_sum() -> None:
    backbone, value, linear, quadratic = gaussian()
    latents = backbone.draw(16, torch.Generator().manual_seed(0))
    moments = backbone.posterior(latents, 0.6)
    expected = 2 * linear.expectation(*moments) + 0.5 * quadratic.expectation(*moments)
    torch.testing.assert_close(value(latents, 0.6), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["stitched", "tweedie"])
def test_align_steers_by_the_joint_reward(kind) -> None:
    backbone, value, linear, quadratic = gaussian()
    joint = value.objective()
    assert isinstance(joint, JointReward)
    steer = value if kind == "stitched" else core.Tweedie(joint)
    result = core.align("fk-steering", backbone, steer, ["0", "1"], steps=6, progress=False)
    assert result.settings["reward"]["name"] == "2 LinearReward + 0.5 QuadraticReward"
    clean = result.particles.latents.flatten(0, 1)
    expected = 2 * linear.expectation(clean, 0.0) + 0.5 * quadratic.expectation(clean, 0.0)
    torch.testing.assert_close(result.particles.rewards.flatten(), expected, rtol=1e-4, atol=1e-4)
    same = core.align("fk-steering", backbone, steer, ["0", "1"], steps=6, reward=joint, progress=False)
    assert torch.equal(same.particles.latents, result.particles.latents)
    with pytest.raises(ConfigError, match="estimates 2 LinearReward . 0.5 QuadraticReward but reward is LinearReward"):
        core.align("fk-steering", backbone, steer, ["0"], steps=6, reward=linear, progress=False)


@torch.no_grad()
def test_the_joint_reward_rates_images_by_the_weighted_sum(rewards) -> None:
    joint = JointReward([*rewards.values(), twin(AESTHETIC)], [1, 2, -0.25])
    images = torch.rand(3, 3, 40, 30, generator=torch.Generator().manual_seed(2))
    with CostMeter() as cost:
        rated = joint.rate(images, joint.condition(PROMPTS))
    assert cost.passes["reward"] == 9
    scores = [r.score(r.judge(images), r.condition(PROMPTS)) for r in rewards.values()]
    aesthetic = twin(AESTHETIC)
    expected = scores[0] + 2 * scores[1] - 0.25 * aesthetic.judge(images).score
    torch.testing.assert_close(rated, expected)
    assert joint.record.name == f"{DFN} + 2 {HPS} + -0.25 {AESTHETIC}"
    assert joint.condition_kind == "prompts"
    rows = joint.condition(PROMPTS).index([2]).expand(3)
    torch.testing.assert_close(joint.rate(images, rows), joint.rate(images, joint.condition([PROMPTS[2]] * 3)))


def test_a_reward_may_be_given_as_weights_by_name(monkeypatch) -> None:
    monkeypatch.setattr("stitchvm.core.joint.load_reward", lambda name, device: twin(name))
    found = load_judge({HPS: 1, AESTHETIC: 0.5})
    assert isinstance(found, JointReward)
    assert (found.record.name, found.weights) == (f"{HPS} + 0.5 {AESTHETIC}", (1.0, 0.5))
    assert load_judge({HPS: 1}) is twin(HPS)
    assert load_judge({HPS: 2}).record.name == f"2 {HPS}"
    for wrong, message in ({}, "no reward was given"), ({HPS: "much"}, "give a number"), ({HPS: math.nan}, "finite"):
        with pytest.raises(ConfigError, match=message):
            load_judge(wrong)


def test_what_a_joint_reward_compares_with() -> None:
    assert JointReward([twin(AESTHETIC)]).condition_kind == "nothing"
    assert JointReward([twin(HPS), twin(DINO)]).condition_kind == "images"
    with pytest.raises(ConfigError, match="leave the condition out"):
        JointReward([twin(AESTHETIC)]).condition(PROMPTS)
    with pytest.raises(ConfigError, match="2 rewards .* but 3 weights"):
        JointReward([twin(AESTHETIC), twin(HPS)], [1, 2, 3])
    with pytest.raises(ConfigError, match="only prompts to steer by"):
        core.align("fk-steering", GaussianBackbone(), core.Tweedie(JointReward([twin(HPS), twin(DINO)])), ["0"])


# -- measuring --------------------------------------------------------------------------------------------------------


def test_each_reward_of_a_joint_value_is_measured_by_its_own_branch(backbone, monkeypatch) -> None:
    value, read = made((DFN, HPS)), []
    real = evaluation.noisy_readings

    def embeddings(*args: Any, **settings: Any) -> Tensor:
        read.append(real(*args, **settings))
        return read[-1]

    monkeypatch.setattr(evaluation, "noisy_readings", embeddings)
    captions = [f"picture {n}" for n in range(8)]
    settings: dict[str, Any] = {"images": torch.stack(pictures()), "captions": captions, "backbone": backbone,
                                "sigmas": (0.1,), "progress": False}  # fmt: skip
    for name in (DFN, HPS):
        assert core.evaluate(value, reward=name, **settings) == core.evaluate(alone(value, name), **settings)
        assert torch.equal(read[-1], read[-2])
    assert not torch.allclose(read[0], read[2])
    with pytest.raises(ConfigError, match=f"reads {DFN}, {HPS}; say which"):
        core.evaluate(value, **settings)
    with pytest.raises(ConfigError, match="'clip' is none of them"):
        core.evaluate(value, reward="clip", **settings)


def test_seeds_are_ranked_by_the_joint_reward() -> None:
    backbone, value, linear, quadratic = gaussian()
    ranks = core.rank_seeds(
        backbone, {"stitched": core.Stitched(value)}, value.objective(), ["0"], seeds=6, steps=4, progress=False
    )
    assert ranks.rewards.shape == (1, 6)
    alone = [core.rank_seeds(backbone, {}, reward, ["0"], seeds=6, steps=4, progress=False).rewards
             for reward in (linear, quadratic)]  # fmt: skip
    torch.testing.assert_close(ranks.rewards, 2 * alone[0] + 0.5 * alone[1])
