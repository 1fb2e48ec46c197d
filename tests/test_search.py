"""Stage 1 against ``torch.linalg.lstsq`` in float64, and the search end to end in the analytic world."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analytic import CONTRAST, GaussianBackbone, LinearReward
from stitchvm import core
from stitchvm.core.stitching.regression import RegressionStatistics


def features(rank: int, rows: int = 600, c_in: int = 12, c_out: int = 5) -> tuple[Tensor, Tensor]:
    """Sources of a given rank with a large offset, and targets that depend on them with noise."""
    generator = torch.Generator().manual_seed(rank)
    basis = torch.randn(rank, c_in, generator=generator, dtype=torch.float64)
    source = torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ basis + 30.0
    mixing = torch.randn(c_in, c_out, generator=generator, dtype=torch.float64)
    target = source @ mixing + 0.3 * torch.randn(rows, c_out, generator=generator, dtype=torch.float64) + 7.0
    return source, target


@pytest.mark.parametrize("rank", [12, 5])
def test_streamed_map_is_the_least_squares_solution(rank: int) -> None:
    source, target = features(rank)
    statistics = RegressionStatistics()
    for start in range(0, len(source), 37):
        statistics.add(source[start : start + 37], target[start : start + 37])
    fitted = statistics.solve()
    centred, offset = source - source.mean(0), target - target.mean(0)
    # gelsd takes the minimum-norm solution where the source is rank deficient
    truth = torch.linalg.lstsq(centred, offset, driver="gelsd").solution
    residual = (centred @ truth - offset).square().mean(0)
    relative = (fitted.weight.T - truth).norm() / truth.norm()
    assert relative < 1e-6
    assert torch.allclose(fitted.error, residual, rtol=1e-6)
    assert torch.allclose(source @ fitted.weight.T + fitted.bias, centred @ truth + target.mean(0), rtol=1e-6)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(core.DataError, match="at least one image"):
        RegressionStatistics().solve()


def images(count: int) -> Tensor:
    backbone = GaussianBackbone()
    return backbone.decode_latents(backbone.draw(count, torch.Generator().manual_seed(1)))


def test_search_fits_every_pair_by_least_squares_on_cached_features() -> None:
    """The streamed result equals one lstsq over all the features, cached."""
    backbone, reward = GaussianBackbone(), LinearReward()
    result = core.search(
        backbone, reward, images=list(images(64)), blocks=(1, 2), probes=64, batch=8, progress=False, criterion="mse"
    )
    from stitchvm.core.images import open_images
    from stitchvm.core.stitching.searching import ProbeStream

    stream = ProbeStream(backbone, {"x": reward}, open_images(list(images(64))), (2,), 64, None, 8, 0, False)
    sources, targets = [], []
    for probe in stream.batches(held=False):
        sources.append(probe.features[2].permute(0, 2, 3, 1).flatten(0, 2))
        state = reward.head(probe.pixels["x"], None, 1)
        targets.append(reward.grid(state).permute(0, 2, 3, 1).flatten(0, 2))
    source, target = torch.cat(sources).double(), torch.cat(targets).double()
    design = torch.cat([source, torch.ones(len(source), 1, dtype=torch.float64)], 1)
    best = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert result.loss[2, 2] == pytest.approx(float((best - target).square().mean()), rel=1e-6)
    assert set(result.loss) == {(i, j) for i in (1, 2, 3) for j in (1, 2)}
    assert tuple(result.report()["best"].values()) in set(result.loss)


def test_vae_stitching_is_a_cut_like_any_other() -> None:
    result = core.search(
        GaussianBackbone(),
        LinearReward(),
        images=list(images(32)),
        cuts=(core.LATENT, 1),
        blocks=(1,),
        probes=32,
        progress=False,
    )
    assert set(result.loss) == {(core.LATENT, 1), (1, 1)}
    assert result.losses["mse"][core.LATENT, 1] > result.losses["mse"][1, 1]


MEASURED = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from analytic import GaussianBackbone, LinearReward
from stitchvm import core

class Pictures:
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(3, 32, 32, generator=generator) for _ in range({count}))

torch.set_num_threads(1)
found = core.search(GaussianBackbone(side=32), LinearReward(side=32), images=Pictures(), probes={count}, progress=False)
assert found.probes == {count}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_peak_memory_does_not_grow_with_the_probe_set() -> None:
    """Keeping the features of 1,440 more images (three cuts, 14 channels, 32 x 32, float32) would take 236 MiB."""

    def peak(count: int) -> int:
        script = MEASURED.format(tests=str(Path(__file__).parent), count=count)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert peak(1536) - peak(96) < 60


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"criterion": "vibes"}, core.ConfigError, "mse, unexplained, functional"),
        ({"cuts": (9,)}, core.SliceError, "cut 9 is out of range"),
        ({"blocks": (7,)}, core.SliceError, "out of range"),
        ({"images": []}, core.DataError, "empty"),
        ({"images": [torch.zeros(3, 2, 2)]}, core.DataError, "at least 4 probe images"),
    ],
)
def test_bad_input_is_one_clear_error(settings: dict, error: type[Exception], words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=words):
        core.search(GaussianBackbone(), LinearReward(), **{"images": list(images(8)), "progress": False, **settings})


def test_the_world_is_wide_enough_not_to_clamp() -> None:
    assert float((images(500) - 0.5).abs().max()) < 0.5 and CONTRAST > 0
