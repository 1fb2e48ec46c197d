"""One broken plugin a check: a good toy with a single mistake that somebody could make.

Each is called without arguments and gives what ``examine`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mutant_aligners import ALIGNERS
from mutant_backbones import BACKBONES
from mutant_networks import NETWORKS
from mutant_rewards import REWARDS
from mutant_trainers import TRAINERS

MUTANTS: dict[str, dict[str, Callable[[], Any]]] = {
    "backbone": {**NETWORKS["backbone"], **BACKBONES},
    "reward": {**NETWORKS["reward"], **REWARDS},
    "aligner": ALIGNERS,
    "trainer": TRAINERS,
}
