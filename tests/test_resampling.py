"""Resamplers against what defines them: unbiased counts, how far a count may stray, and nothing from weight zero."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm.core import RESAMPLERS, ConfigError, effective_sample_size

WEIGHTS = torch.tensor([0.05, 0.37, 0.0, 0.28, 0.1, 0.2])
"""Expected counts below 1, above 1 and whole ones (0.0, and 0.3 2.22 0 1.68 0.6 1.2 of 6)."""

WITHIN = {"systematic": 1.0, "ssp": 1.0, "stratified": 2.0}
"""How far a count may be from ``N w``; multinomial and residual have no bound above."""


def counts(name: str, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    ancestors = RESAMPLERS[name](weights, generator)
    assert ancestors.shape == weights.shape
    return ancestors.bincount(minlength=len(weights))


@pytest.mark.parametrize("name", RESAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_counts_are_unbiased(name, scale):
    """2,000 runs; the mean count within five of its standard errors. The weights need not sum to 1."""
    generator, runs = torch.Generator().manual_seed(0), 2000
    found = torch.stack([counts(name, scale * WEIGHTS, generator) for _ in range(runs)]).double()
    error = found.std(0) / math.sqrt(runs)
    assert ((found.mean(0) - 6 * WEIGHTS.double()).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("multinomial", lambda expected: expected * (1 - expected / 6)),
        ("residual", lambda expected: (rest := expected - expected.floor()) * (1 - rest / rest.sum())),
        ("ssp", lambda expected: (rest := expected - expected.floor()) * (1 - rest)),
        ("systematic", lambda expected: (rest := expected - expected.floor()) * (1 - rest)),
    ],
)
def test_counts_vary_as_much_as_the_scheme_says(name, variance):
    """The variance of the counts in closed form: that of 6 draws, of the 2 that the floors leave, of one coin. 2,000
    runs; a variance is known to ``sqrt((kurtosis - 1) / runs)`` of itself, and no count here has a kurtosis above
    7."""
    generator, runs = torch.Generator().manual_seed(1), 2000
    found = torch.stack([counts(name, WEIGHTS, generator) for _ in range(runs)]).double().var(0)
    expected = variance(6 * WEIGHTS.double())
    assert ((found - expected).abs() <= 5 * math.sqrt(6 / runs) * expected + 1e-6).all()


@pytest.mark.parametrize("name", WITHIN)
def test_counts_stay_within_their_bounds(name):
    generator = torch.Generator().manual_seed(2)
    for size in (2, 3, 7, 40):
        for _ in range(100):
            weights = (3 * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(0)
            assert ((counts(name, weights, generator) - size * weights).abs() < WITHIN[name]).all()


def test_residual_copies_the_floors_for_sure():
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        weights = torch.randn(9, generator=generator, dtype=torch.float64).softmax(0)
        assert (counts("residual", weights, generator) >= (9 * weights).floor()).all()


def test_ssp_does_not_depend_on_neighbours_as_systematic_does():
    """Expected counts 1/2 and 3/2 in turn: one comb offset takes all or none of the halves, SSP decides pair by
    pair."""
    weights = torch.tensor([0.5, 1.5] * 3)
    generator = torch.Generator().manual_seed(4)
    halves = {
        name: {tuple(counts(name, weights, generator)[::2].tolist()) for _ in range(300)}
        for name in ("systematic", "ssp")
    }
    assert halves["systematic"] == {(0, 0, 0), (1, 1, 1)}
    assert len(halves["ssp"]) > 2


@pytest.mark.parametrize("name", ["systematic", "stratified", "residual", "ssp"])
@pytest.mark.parametrize("size", [1, 3, 6, 7, 49])
def test_equal_particles_are_kept(name, size):
    """Also in float32, where N times 1/N may be a hair below 1."""
    weights = torch.zeros(size).softmax(0)
    ancestors = RESAMPLERS[name](weights, torch.Generator().manual_seed(5))
    assert sorted(ancestors.tolist()) == list(range(size))


@pytest.mark.parametrize("name", RESAMPLERS)
def test_one_particle_is_its_own_ancestor(name):
    assert RESAMPLERS[name](torch.ones(1), torch.Generator()).tolist() == [0]


@pytest.mark.parametrize("name", RESAMPLERS)
@pytest.mark.parametrize("draw", [0.0, math.nextafter(1.0, 0.0)], ids=["least", "greatest"])
@pytest.mark.parametrize(
    "weights", [[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1.0]], ids=str
)
def test_weight_zero_is_never_drawn_not_even_by_an_extreme_draw(name, draw, weights, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full((size,), draw, dtype=torch.float64))
    found = counts(name, torch.tensor(weights), torch.Generator())
    assert found.sum() == len(weights)
    assert all(count == 0 for count, weight in zip(found.tolist(), weights, strict=True) if weight == 0)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_the_generator_is_the_only_randomness(name):
    state = torch.random.get_rng_state()
    first, again, other = (RESAMPLERS[name](WEIGHTS, torch.Generator().manual_seed(seed)) for seed in (6, 6, 7))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", RESAMPLERS)
@pytest.mark.parametrize("weights", [[0.0, 0.0], [-0.5, 1.5], [float("nan"), 1.0], [float("inf"), 1.0]], ids=str)
def test_weights_that_are_none_are_refused(name, weights):
    with pytest.raises(ConfigError, match="finite, not negative and not all zero"):
        RESAMPLERS[name](torch.tensor(weights), torch.Generator())


def test_effective_sample_size():
    logs = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -1e4, -1e4, -1e4], [5000.0, 5000.0, -1e4, -1e4]])
    assert torch.allclose(effective_sample_size(logs), torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))
