"""Online Diffusion-DPO against the published loss, and which pairs it makes."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from stitchvm.core import Prediction, Prompted
from stitchvm.plugins.aligners.diffusion_dpo import DiffusionDpo
from training_worlds import UPDATE, Brightness, assert_same, gradients, problem, rows_of


@pytest.mark.parametrize("stop", [None, (2, 3)])
def test_the_pair_is_the_best_and_the_worst_sample_of_a_prompt_where_it_stopped(stop):
    task, settings = problem(), DiffusionDpo(samples_per_prompt=5, stop=stop)
    found = settings.collect(task, UPDATE)
    steps = int(found.figures["stop"])
    assert steps in ((2, 3) if stop else (task.steps,))
    owners = task.owners(UPDATE, 5)
    ends = task.rollout(task.policy.backbone, task.noise(task.seeds(UPDATE, 5, 0)), owners, steps).unflatten(0, (2, 5))
    brightness = ends.mean((2, 3, 4))
    best, worst = brightness.argmax(1), brightness.argmin(1)
    assert found.rows["sample"].unique().tolist() == [int(best[0]), 5 + int(best[1])]
    rows = rows_of(found)
    assert torch.equal(rows["anchor"], ends[[0, 1], best].repeat_interleave(steps, 0))
    assert torch.equal(rows["rival"], ends[[0, 1], worst].repeat_interleave(steps, 0))
    assert len(found) == 2 * steps
    assert torch.equal(rows["tau"], task.sigmas[steps].expand(2 * steps))


@pytest.mark.parametrize("stop", [None, (2, 2)])
def test_the_loss_is_the_published_one_with_its_gradient(stop):
    """``-log sigmoid(-beta / 2 ((|v - v_w|^2 - |v_ref - v_w|^2) - (.. of the loser)))``, winner and loser under one
    noise, ``v_w`` the velocity of the flow from the anchor."""
    task, settings = problem(moved=0.05), DiffusionDpo(samples_per_prompt=3, stop=stop, beta=50.0)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, figures = settings.loss(task, rows)

    t, tau = (rows[name][:, None, None, None] for name in ("sigma", "tau"))
    noise, condition = task.noise(rows["seed"]), task.conditions.index(rows.owners)
    scale = (1 - t) / (1 - tau)
    std = (t**2 - scale**2 * tau**2).sqrt()
    excess = []
    for name in ("anchor", "rival"):
        latents = scale * rows[name] + std * noise
        target = -rows[name] / (1 - tau) + (t + scale * tau**2 / (1 - tau)) / std * noise
        one, two = (network.denoise(latents, rows["sigma"], condition) for network in
                    (task.policy.backbone, task.reference))  # fmt: skip
        ours, theirs = (((each.eps - each.z0) - target).square().mean((1, 2, 3)) for each in (one, two))
        excess.append(ours - theirs.detach())
    margin = -25.0 * (excess[0] - excess[1])
    expected = -torch.nn.functional.logsigmoid(margin)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert figures["accuracy"] == pytest.approx(float((margin > 0).float().mean()))
    assert float((losses.detach() - math.log(2)).abs().max()) > 1e-3
    assert_same(gradients(task, settings.loss(task, rows)[0]), gradients(task, expected))


def test_the_loss_begins_at_log_2_and_a_step_down_it_prefers_the_winner():
    task, settings = problem(), DiffusionDpo(samples_per_prompt=3, stop=(2, 2), beta=50.0)
    rows = rows_of(settings.collect(task, UPDATE))
    losses, figures = settings.loss(task, rows)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert figures["accuracy"] == 0.0
    slopes = gradients(task, losses)
    with torch.no_grad():
        for name, gradient in slopes.items():
            task.policy.parameters[name].sub_(0.05 * gradient / gradient.abs().max().clamp_min(1e-12))
    after, figures = settings.loss(task, rows)
    assert float(after.detach().mean()) < math.log(2) and figures["accuracy"] > 0.5


@attrs.frozen(eq=False)
class Deaf(Brightness):
    """All samples of the first prompt alike, and no number for one sample of the second."""

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        value: Any = super().__call__(latents, sigma, context, prediction)
        value[:3], value[3] = 0.5, math.nan
        return value


def test_a_prompt_without_an_order_teaches_nothing_and_a_lost_sample_is_in_no_pair():
    task, settings = problem(estimator=Deaf(), moved=0.05), DiffusionDpo(samples_per_prompt=3)
    with pytest.warns(RuntimeWarning, match="1 of 6 samples have no finite value"):
        rows = rows_of(settings.collect(task, UPDATE))
    alike, ordered = rows.owners == 0, rows.owners == 1
    assert torch.equal(rows["anchor"][alike], rows["rival"][alike])
    slopes = gradients(task, settings.loss(task, rows)[0][alike])
    assert max(float(slope.abs().max()) for slope in slopes.values()) < 1e-6
    noise = task.noise(task.seeds(UPDATE, 3, 0))
    ends = task.rollout(task.policy.backbone, noise, task.owners(UPDATE, 3), task.steps)
    dark, light = sorted(ends[4:], key=lambda end: float(end.mean()))
    assert torch.equal(rows["anchor"][ordered][0], light) and torch.equal(rows["rival"][ordered][0], dark)
