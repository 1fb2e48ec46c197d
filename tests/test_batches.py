"""How a batch of stage 2 is dealt out to processes."""

from __future__ import annotations

import pytest
import torch

from stitchvm.core.stitching.batches import share_of


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_take_whole_groups_of_one_batch(processes: int) -> None:
    """Six examples of their own and six groups of four, dealt out in turn: every row once, no group split."""
    group = torch.cat([torch.full((6,), -1.0), torch.arange(6).repeat_interleave(4).float()])
    shares = [share_of(group, process, processes) for process in range(processes)]
    assert torch.cat(shares).sort().values.tolist() == list(range(30))
    owners = [set(group[share].tolist()) - {-1.0} for share in shares]
    assert sum(len(owned) for owned in owners) == 6
    assert {len(share) for share in shares} == {30 // processes}


def test_a_batch_of_one_group_is_whole() -> None:
    assert share_of(torch.zeros(4), 0, 2).tolist() == [0, 1, 2, 3] and not len(share_of(torch.zeros(4), 1, 2))
