"""The plainest checkpoint: a network's tensors in one safetensors file, under the names of its own modules.

What :class:`~stitchvm.core.Backbone` and :class:`~stitchvm.core.Reward` read unless a family knows another layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ArtefactError, WeightsError
from .files import read_tensors
from .sources import resolve_source

if TYPE_CHECKING:
    from .records import BackboneRecord, RewardRecord
    from .slicing import Sliced

WEIGHTS_FILE = "model.safetensors"


def read_weights(
    network: Sliced, record: BackboneRecord | RewardRecord, *, token: str | None, local_files_only: bool
) -> None:
    """Fill ``network.weights()`` from the record's file, by default :data:`WEIGHTS_FILE`; strictly.

    Raises :class:`WeightsError` for weights that are missing, truncated or of another architecture.
    """
    place = resolve_source(record, token=token, local_files_only=local_files_only)
    file = place / (getattr(record, "filename", None) or WEIGHTS_FILE) if place.is_dir() else place
    try:
        network.weights().load_state_dict(read_tensors(file))
    except (ArtefactError, RuntimeError) as error:
        raise WeightsError(f"{str(file)!r} cannot be read as the weights of {record.name!r}: {error}") from error
