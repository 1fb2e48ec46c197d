"""Independent random streams from one run's seed."""

from __future__ import annotations

import numpy as np

from .errors import ConfigError


def stream_seed(seed: int, *stream: int) -> int:
    """A seed for the stream that ``stream`` names within the run's ``seed``; different names give unrelated seeds.

    Raises :class:`ConfigError` for a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; use a whole number, 0 or more.")
    # torch's CPU generator keeps only 32 bits of a seed, so neighbouring numbers must be hashed, not packed
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)[0])
