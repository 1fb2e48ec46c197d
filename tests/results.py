"""A quickstart summary with made-up numbers in it, of the shape that the real one has."""

from __future__ import annotations

from typing import Any


def statistic(mean: float, stderr: float | None) -> dict[str, float | None]:
    return {"mean": mean, "stderr": stderr}


def method(score: float, detector: float, gain: float | None, /, **cost: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "reward": statistic(score, 0.005), "detector": statistic(detector, 0.07),
        "cost": {**cost, "peak_memory": 1.2e9},
    }  # fmt: skip
    return found if gain is None else {**found, "gain": statistic(gain, 0.0034)}


def search_report() -> dict[str, Any]:
    grid = []
    for i in range(1, 5):
        for j in range(1, 4):
            loss = 0.2 + 0.03 * abs(i - 3) + 0.05 * j
            grid.append({"i": i, "j": j, "mse": 3 * loss, "unexplained": 2 * loss, "functional": loss})
    return {"backbone": "shapes-mmdit", "reward": "shapes-clip", "criterion": "functional", "probes": 200,
            "best": {"i": 3, "j": 1}, "grid": grid}  # fmt: skip


def summary() -> dict[str, Any]:
    return {
        "pair": {"backbone": "shapes-mmdit", "reward": "shapes-clip"},
        "interface": {"i": 3, "j": 1},
        "search": search_report(),
        "retrieval": {
            "sigma": [0.1, 0.25, 0.5, 0.75, 0.9], "clean": 0.843, "stitched": [0.812, 0.803, 0.751, 0.424, 0.091],
            "vae": [0.621, 0.553, 0.372, 0.161, 0.031], "retention": [0.963, 0.953, 0.891, 0.503, 0.108], "count": 1000,
        },
        "ranking": {
            "sigma": [0.9, 0.75, 0.5, 0.25, 0.1], "stitched": [0.21, 0.39, 0.66, 0.72, 0.74],
            "tweedie": [0.33, 0.6, 0.88, 0.97, 0.99],
            "stderr": {"stitched": [0.06, 0.05, 0.04, 0.03, 0.03], "tweedie": [0.05, 0.04, 0.02, 0.01, None]},
            "prompts": 16, "seeds": 8,
            "cost": {"stitched": {"head": 641, "tail": 641, "seconds": 3.21},
                     "tweedie": {"decoder": 642, "reward": 642, "seconds": 9.87}},
        },
        "steering": {
            "prompts": 48,
            "settings": {"particles": 4, "steps": 28, "fk_stitched": {"proposals": 2, "proposal_window": [0.1, 0.4]}},
            "base": method(0.231, 0.54, None, denoiser=2688, decoder=48, reward=48, seconds=14.2),
            "best_of_n": method(0.252, 0.66, 0.0211, denoiser=10751, decoder=192, reward=192, seconds=56.8),
            "fk_tweedie": method(0.263, 0.70, 0.0321, denoiser=10752, decoder=1344, reward=1344, seconds=81.5),
            "fk_stitched": method(
                0.261, 0.72, 0.0303, denoiser=10753, decoder=192, reward=192, head=2304, tail=2305, seconds=62.3
            ),
        },
        "seconds": {"load": 2.1, "search": 17.3, "finetune": 211.4, "total": 605.1},
        "versions": {"python": "3.11.2", "stitchvm": "0.1.0"},
        "seed": 3,
        "command": "stitchvm quickstart --out out --seed 3",
    }  # fmt: skip


def cell(backbone: str, reward: str, metric: str, clean: float, chance: float | None) -> dict[str, Any]:
    stitched, vae = [0.9 * clean, 0.87 * clean, 0.5 * clean], [0.7 * clean, 0.61 * clean, 0.3 * clean]
    return {
        "backbone": backbone, "reward": reward, "metric": metric, "sigma": [0.1, 0.25, 0.75], "clean": clean,
        "stitched": stitched, "vae": vae, "retention": {"stitched": [0.9, 0.87, 0.5], "vae": [0.7, 0.61, 0.3]},
        "chance": chance, "count": 100, "interface": {"i": 2, "j": 1}, "seed": 0,
    }  # fmt: skip


def matrix_report() -> dict[str, Any]:
    """A partial matrix: one backbone and one reward of six pairs are not measured at all, one pair is missing."""
    cells = [cell("net-a", "taste", "preference", 0.9, 0.5), cell("net-b", "taste", "preference", 0.9, 0.5),
             cell("net-b", "words", "recall", 0.8, 0.01)]  # fmt: skip
    return {"world": "toy", "partial": True, "pairs": 6, "measured": 3, "backbones": ["net-a", "net-b", "net-c"],
            "rewards": ["taste", "words"], "cells": cells}  # fmt: skip
