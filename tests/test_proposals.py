"""Draws of which the best go on: which they are, and what of a head's passes is held meanwhile and finished after."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from analytic import GaussianBackbone, LinearReward, exact_stitched
from problems import problem
from stitchvm.core import AlignProblem, Condition, CostMeter, Stitched, as_sigma, load_aligner
from stitchvm.core.alignment.particles import step_generators
from stitchvm.core.conditions import concatenate
from stitchvm.core.reuse import BegunPasses

ROWS = 6


def task(batch: int = 4096) -> AlignProblem:
    """Of prompts that are the null prompt's, without guidance: a step's only pass is one that the head can begin."""
    backbone, reward = GaussianBackbone(), LinearReward()
    value = Stitched(exact_stitched(backbone, reward))
    return problem(backbone, reward, value, prompts=2, particles=3, steps=6, batch=batch)


@pytest.mark.parametrize("batch", [1, 4, 7, 4096])
@pytest.mark.parametrize("rivals", [1, 3])
def test_the_best_draws_go_on(rivals, batch):
    """Against all draws at once: of every row's four the best, or of a prompt's twelve the three best."""
    one, sigma = task(batch), torch.tensor(0.4)
    kernel = load_aligner("svdd")().transition_kernel()
    latents = one.noise.flatten(0, 1)
    transition = kernel(one.denoise(latents, torch.tensor(0.6)), as_sigma(sigma, latents))
    again = attrs.evolve(one, generators=step_generators(0, range(2)))
    drawn = again.draw(transition.repeat(4))
    values = one.estimator(drawn, as_sigma(sigma, drawn), one.context.index(one.owners(len(drawn))))
    groups = torch.arange(24).split(4 * rivals)
    places = torch.cat([group[values[group].argsort(descending=True)[:rivals]] for group in groups])
    chosen, found, parents = one.propose(transition, 4, sigma, rivals)
    assert torch.equal(chosen, drawn[places])
    torch.testing.assert_close(found, values[places])
    assert torch.equal(parents, places // 4)
    assert one.begun.last is not None
    assert torch.equal(one.begun.last.x.latents, chosen)


def test_a_draw_without_a_value_is_the_last_to_be_chosen():
    one = task()
    latents = one.noise.flatten(0, 1)
    transition = load_aligner("svdd")().transition_kernel()(
        one.denoise(latents, torch.tensor(0.6)), as_sigma(0.4, latents)
    )

    def lapsing(drawn, sigma, context, prediction=None):
        values = -1.0 - torch.arange(len(drawn))
        return values.masked_fill(torch.arange(len(drawn)) % 2 == 0, float("nan"))

    with pytest.warns(RuntimeWarning, match="12 of 24 latents"):
        _, values, _ = attrs.evolve(one, estimator=lapsing).propose(transition, 4, torch.tensor(0.4))
    assert values.tolist() == [-2.0 - 4 * row for row in range(ROWS)]


class Watched(BegunPasses):
    """Notes the most rows that are held at once."""

    most = 0

    def narrow(self, rows: torch.Tensor) -> None:
        self.most = max(self.most, len(self._rows))
        super().narrow(rows)
        assert self._aside is None or len(self._aside) == len(self._rows)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("svdd", {"proposals": 20}), ("dsearch", {"branches": 20, "interval": 1}),
     ("fk-steering", {"proposals": 20, "proposal_window": (0.0, 1.0)})],
)  # fmt: skip
def test_no_more_passes_are_held_than_go_on_and_one_chunk(name, settings):
    held = Watched()
    load_aligner(name)(**settings).run(attrs.evolve(task(batch=2), begun=held))
    assert ROWS <= held.most <= ROWS + 2


def test_without_reuse_none_is_held():
    held = Watched(enabled=False)
    load_aligner("svdd")(proposals=5).run(attrs.evolve(task(batch=2), begun=held))
    assert held.most == 0


@pytest.mark.parametrize(("name", "settings"), [("svdd", {"proposals": 4}), ("rbf", {"quota": 4})])
def test_the_next_step_finishes_the_pass_of_every_draw_that_goes_on(name, settings):
    """In each denoising step but the first, which follows no draw."""
    runs: dict[bool, Any] = {}
    for enabled in (True, False):
        with CostMeter() as cost:
            found = load_aligner(name)(**settings).run(attrs.evolve(task(batch=4), begun=BegunPasses(enabled)))
        runs[enabled] = found.latents, cost.passes
    (latents, saved), (plain, whole) = runs[True], runs[False]
    assert torch.equal(latents, plain)
    assert (saved["resumed"], whole["resumed"]) == (ROWS * 5, 0)
    assert whole["denoiser"] - saved["denoiser"] == ROWS * 5
    assert saved["head"] == whole["head"]


def test_what_was_set_aside_comes_back_row_by_row():
    one = task()
    passes, latents = BegunPasses(), one.noise.flatten(0, 1)
    with_head = attrs.evolve(one, begun=passes)

    def begin(rows):
        with_head.estimate(latents[rows], torch.tensor(0.5), owners=one.owners(ROWS)[rows])

    begin([0, 1, 2, 3])
    passes.set_aside(torch.tensor([10, 11, 12, 13]))
    begin([4, 5])
    passes.set_aside(torch.tensor([12]), torch.tensor([1]))
    passes.narrow(torch.tensor([10, 12, 13]))
    passes.bring_back(torch.tensor([13, 12]))
    assert passes.last is not None
    assert torch.equal(passes.last.x.latents, latents[[3, 5]])
    begin([0, 1])
    passes.set_aside(torch.tensor([0, 1]))
    passes.bring_back(torch.tensor([0, 2]))
    assert passes.last is None


def test_one_sample_for_many_is_not_copied_for_each():
    null = Condition({"text": torch.rand(1, 3, 5)}).expand(8)
    for some in (null.index(torch.tensor([2, 5, 5])), null.index([1, 2, 3]), null.index(torch.arange(8) < 3)):
        assert len(some) == 3 and some["text"].stride(0) == 0
        assert torch.equal(some["text"], null["text"][:3])
    both = concatenate([null, null.index([0, 1])])
    assert len(both) == 10 and both["text"].stride(0) == 0
    other = Condition({"text": torch.rand(1, 3, 5)}).expand(2)
    mixed = concatenate([null, other])
    assert torch.equal(mixed["text"], torch.cat([null["text"], other["text"]]))
