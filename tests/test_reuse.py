"""The denoising step finishes the pass that the value model's head began: the same samples, fewer blocks run."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

import families
from analytic import GaussianBackbone, LinearReward, exact_stitched
from problems import problem
from stitchvm.core import (
    AlignProblem,
    Backbone,
    Condition,
    CostMeter,
    Denoiser,
    Head,
    Prompted,
    Stitched,
    StitchedValue,
    Sum,
    Tail,
    Tweedie,
    align,
    load_aligner,
)
from stitchvm.core.alignment.particles import initial_noise, step_generators
from stitchvm.core.branch import Branch
from stitchvm.core.layer import StitchingLayer
from stitchvm.core.reuse import BegunPasses, PassKeeper, joined

BUILT: dict[str, Any] = {
    "mmdit": (families.mmdit, families.mmdit_input),
    "flux": (families.flux, families.flux_input),
    "unet": (families.unet, families.unet_input),
}
CUT = 2


def family(name: str) -> tuple[Backbone, StitchedValue, Condition, Condition]:
    """A backbone with random weights, a value model on its blocks 1 and 2, and conditions for prompts and none."""
    build, example = BUILT[name]
    backbone = build().eval().requires_grad_(False)
    x, condition = example(backbone)
    null = condition.index([2])
    head = Head(backbone, CUT)
    channels = head(x, condition).shape[1]
    torch.manual_seed(3)
    reward = LinearReward(side=4)
    layer = StitchingLayer(channels, 6, reward.grid_size)
    value = StitchedValue(head, {"linear": Branch(layer, Tail(reward, 1, torch.zeros(1, 6)))}, null)
    return backbone, value.requires_grad_(False), condition.index([0, 1]), null


def task(backbone: Backbone, estimator: Any, condition: Condition, null: Condition, *, reuse: bool, split: bool = True,
         scale: float = 3.0, batch: int = 64) -> AlignProblem:  # fmt: skip
    denoiser = Denoiser(backbone, condition, null, scale, split)

    def judge(latents: torch.Tensor, context: Prompted) -> tuple[torch.Tensor, torch.Tensor]:
        return latents.mean((1, 2, 3)), torch.zeros(len(latents), 3, 2, 2)

    return AlignProblem(
        Prompted(denoiser, Condition()), initial_noise(0, [0, 1], 2, (backbone.latent_channels, 8, 8)),
        torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0]), estimator, judge, step_generators(0, [0, 1]), batch,
        begun=BegunPasses(reuse),
    )  # fmt: skip


PROPOSING = {"proposals": 3, "proposal_window": (0.0, 0.6)}
METHODS: dict[str, dict[str, Any]] = {
    "dps": {"strength": 0.5},
    "fk-steering": {"strength": 5.0, "interval": 1, "window": (0.0, 1.0), **PROPOSING},
    "das": {"strength": 0.5},
    "svdd": {"proposals": 3},
    "dsearch": {"branches": 2, "interval": 1},
}


def run(name: str, problem: AlignProblem) -> tuple[torch.Tensor, Any]:
    with CostMeter() as cost:
        found = load_aligner(name)(**METHODS[name]).run(problem)
    return found.latents, cost.passes


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("method", METHODS)
def test_samples_are_the_same_as_without(method, name):
    """Against the same branches run one after the other; every pass the head began where another follows is finished.

    Up to rounding where the head saw the latent among other proposals: a convolution rounds by the size of its batch.
    """
    backbone, value, condition, null = family(name)
    (plain, whole), (again, saved) = (
        run(method, task(backbone, Stitched(value), condition, null, reuse=reuse)) for reuse in (False, True)
    )
    if method in ("dps", "das"):
        assert torch.equal(plain, again)
    else:
        torch.testing.assert_close(plain, again, atol=1e-3, rtol=1e-3)
    assert whole["resumed"] == 0
    assert saved["resumed"] > 0
    assert saved["denoiser"] + saved["resumed"] == whole["denoiser"]
    assert saved["head"] == whole["head"]


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("method", METHODS)
def test_samples_are_those_of_both_branches_in_one_batch(method, name):
    """A convolution's rounding is another where the head saw the latent among other proposals."""
    backbone, value, condition, null = family(name)
    (plain, whole), (again, saved) = (
        run(method, task(backbone, Stitched(value), condition, null, reuse=reuse, split=False))
        for reuse in (False, True)
    )
    torch.testing.assert_close(again, plain, atol=1e-3, rtol=1e-3)
    assert saved["resumed"] > 0
    assert saved["denoiser"] + saved["resumed"] == whole["denoiser"]


@pytest.mark.parametrize("prompted", [False, True])
def test_a_pass_that_has_begun_is_joined_by_the_other_branch(prompted):
    """Of the blocks that the head ran the other branch runs alone, the rest run for both at once."""
    backbone, value, condition, null = family("mmdit")
    value.prompted = prompted
    plain, _ = run("dps", task(backbone, Stitched(value), condition, null, reuse=False, split=False))
    sizes: dict[int, list[int]] = {CUT - 1: [], CUT: []}
    for block, seen in sizes.items():
        backbone.net.transformer_blocks[block].register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(len(given["hidden_states"])), with_kwargs=True
        )
    again, _ = run("dps", task(backbone, Stitched(value), condition, null, reuse=True, split=False))
    assert sizes == {CUT - 1: [4, 4] * 4, CUT: [8] * 4}  # four steps of two particles of two prompts
    torch.testing.assert_close(again, plain, atol=1e-4, rtol=1e-4)


def test_every_guided_step_saves_the_heads_blocks():
    backbone, value, condition, null = family("mmdit")
    _, saved = run("dps", task(backbone, Stitched(value), condition, null, reuse=True))
    assert saved == {"denoiser": 16, "resumed": 16, "head": 16, "tail": 16}


@pytest.mark.parametrize("batch", [1, 3])
def test_in_chunks_too(batch):
    """Proposals are more than a chunk: what was begun is gathered from several."""
    backbone, value, condition, null = family("flux")
    whole, _ = run("fk-steering", task(backbone, Stitched(value), condition, null, reuse=True))
    parts, saved = run("fk-steering", task(backbone, Stitched(value), condition, null, reuse=True, batch=batch))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    assert saved["resumed"] > 0


def test_a_head_under_the_prompt_serves_the_prompted_branch():
    """Which lets a distilled backbone without an unconditional branch save the pass as well."""
    backbone, value, condition, null = family("flux")
    value.prompted = True
    plain, whole = run("dps", task(backbone, Stitched(value), condition, null, reuse=False, scale=1.0))
    again, saved = run("dps", task(backbone, Stitched(value), condition, null, reuse=True, scale=1.0))
    assert torch.equal(plain, again)
    assert (whole["denoiser"], saved["denoiser"], saved["resumed"]) == (16, 0, 16)


def test_a_sum_with_a_stitched_part_saves_too():
    backbone, value, condition, null = family("mmdit")
    both = Sum([Stitched(value), Stitched(value)], [0.5, 0.5])
    plain, _ = run("dps", task(backbone, both, condition, null, reuse=False))
    again, saved = run("dps", task(backbone, both, condition, null, reuse=True))
    assert torch.equal(plain, again)
    assert saved["resumed"] == 16


def test_another_backbones_value_model_simply_does_not_apply():
    backbone, _, condition, null = family("mmdit")
    _, value, _, _ = family("mmdit")  # equal weights, but modules of its own
    _, saved = run("dps", task(backbone, Stitched(value), condition, null, reuse=True))
    assert saved["resumed"] == 0


def begun_at(backbone: Backbone, value: StitchedValue, latents: torch.Tensor, sigma: float) -> Any:
    with PassKeeper() as kept, torch.no_grad():
        value.features(latents, sigma)
    (begun,) = kept.begun
    return begun


def test_only_the_same_input_is_finished():
    backbone, value, condition, null = family("mmdit")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    begun = begun_at(backbone, value, latents, 0.5)
    x = backbone.noisy(latents, 0.5)
    assert begun.answers(backbone, x, null.expand(2))
    assert not begun.answers(backbone, x, condition)
    assert not begun.answers(backbone, backbone.noisy(latents, 0.6), null.expand(2))
    assert not begun.answers(backbone, backbone.noisy(latents + 1e-3, 0.5), null.expand(2))


@pytest.mark.parametrize("name", BUILT)
def test_chosen_and_joined_passes_end_where_whole_ones_do(name):
    backbone, value, _, null = family(name)
    latents = torch.randn(4, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    begun = begun_at(backbone, value, latents, 0.5)
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        expected = backbone.denoise(latents[rows], 0.5, null).z0
        with CostMeter() as cost:
            chosen = backbone.denoise(latents[rows], 0.5, null, begun.index(rows)).z0
            parts = joined([begun.index(slice(0, 1)), begun.index(slice(1, 4))])
            assert torch.allclose(backbone.denoise(latents, 0.5, null, parts).z0[rows], expected, atol=1e-5)
    assert torch.allclose(chosen, expected, atol=1e-5)
    assert cost.passes == {"resumed": 7}


def test_what_is_kept_holds_no_graph():
    _, value, _, _ = family("mmdit")
    latents = torch.randn(1, 4, 8, 8).requires_grad_()
    with PassKeeper() as kept:
        value.features(latents, 0.5)
    state = kept.begun[0].state
    assert not state.image.requires_grad
    assert not kept.begun[0].x.latents.requires_grad


def test_align_says_whether_passes_are_reused(tmp_path):
    backbone, reward = GaussianBackbone(), LinearReward()
    value = exact_stitched(backbone, reward)
    found = {}
    for reuse in (True, False):
        found[reuse] = align(
            "dps", backbone, value, ["1", "-1"], steps=4, guidance_scale=2.0, strength=5.0, reuse=reuse, progress=False
        )  # fmt: skip
        assert found[reuse].settings["reuse"] is reuse
    assert torch.equal(found[True].particles.latents, found[False].particles.latents)
    assert found[True].cost["resumed"] == 8
    assert "resumed" not in found[False].cost


def test_cost_of_a_look_depends_on_the_estimator():
    """The value is read before the denoiser runs where its head can save work, after it where it reads the denoiser."""
    backbone, reward = GaussianBackbone(), LinearReward()
    value = Stitched(exact_stitched(backbone, reward))
    one = problem(backbone, reward, value, particles=3)
    denoiser = Denoiser(backbone, backbone.encode_prompts(["1"]), backbone.null_condition(), 2.0)
    one = attrs.evolve(one, context=attrs.evolve(one.context, denoiser=denoiser))
    with CostMeter() as cost:
        one.look(one.noise.flatten(0, 1), torch.tensor(0.5))
    assert cost.passes == {"head": 3, "tail": 3, "resumed": 3, "denoiser": 3}


def test_a_pass_begun_after_the_denoising_is_not_kept():
    """A sum with a part that reads the denoiser is asked after it: its stitched part's pass comes too late."""
    backbone, reward = GaussianBackbone(), LinearReward()
    both = Sum([Stitched(exact_stitched(backbone, reward)), Tweedie(reward)], [0.5, 0.5])
    one = problem(backbone, reward, both, particles=3)
    one.look(one.noise.flatten(0, 1), torch.tensor(0.5))
    assert one.begun.last is None
