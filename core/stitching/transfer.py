"""A value model for one backbone from that of another with the same latents: tails as they are, layers fitted anew.

Both backbones read the same noisy latent, so the layer of the one has an exact target, what the other's gives there:
the closed form of stage 1 (paper, section 2) with the finished value in the place of the clean reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from ..artefact import Provenance
from ..backbone import Backbone
from ..branch import Branch
from ..conditions import Condition
from ..errors import ConfigError
from ..grids import resample
from ..latent_space import misfit
from ..layer import StitchingLayer
from ..loading import load_backbone
from ..progress import track
from ..reward import Reward
from ..slicing import Head, checked_cuts, checked_taps, taps_before
from ..value import StitchedValue
from .batches import PROMPT, Batches
from .beginnings import check_rewards
from .regression import AffineMap, RegressionStatistics
from .searching import features_by_cut, rows_of
from .texts import Texts, encode_all

FITTED = 2048
"""Noisy latents that the layers are fitted on."""


@attrs.frozen(eq=False)
class Teacher:
    """The finished ``value`` of another backbone, and where the new one may be cut: after one of ``cuts``, with
    ``taps``. ``texts`` are what its own backbone makes of the prompts that examples were drawn for, where its head
    reads any."""

    value: StitchedValue
    path: str
    texts: Texts | None
    cuts: tuple[int, ...]
    taps: tuple[int, ...]

    @classmethod
    def of(
        cls,
        folder: str | Path,
        backbone: Backbone,
        rewards: Mapping[str, Reward],
        prompts: Sequence[str] | None,
        cuts: Sequence[int] | None = None,
        taps: Sequence[int] = (),
    ) -> Self:
        """The value model in ``folder``, to be taken over for ``backbone``; ``cuts`` are by default after every block.

        Raises :class:`ConfigError` where it is of other rewards or ``backbone`` has other latents, ``ArtefactError``
        where there is none or its backbone cannot be loaded, ``SliceError`` for a cut or tap out of range.
        """
        cuts, taps = checked_cuts(backbone, cuts), checked_taps(backbone, taps, backbone.depth)
        value = StitchedValue.from_pretrained(folder, device=backbone.device)
        check_rewards(value, folder, rewards)
        source = value.head.part
        assert isinstance(source, Backbone)
        if reason := misfit(source, backbone):
            raise ConfigError(f"the value model in {str(folder)!r} cannot be transferred: {reason}.")
        if not value.prompted or not prompts:
            return cls(value, str(folder), None, cuts, taps)
        assert source.record is not None, "a saved value's head is loaded by the model's name"
        read = encode_all(load_backbone(source.record, device=backbone.device), prompts)
        return cls(value, str(folder), Texts.of(value.null, read), cuts, taps)

    def targets(self, latents: Tensor, sigma: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """``[n, C]`` by reward, on its own grid: what the layers' linear maps give on latents ``[B, C, h, w]`` drawn
        for the prompts of these ``numbers [B]`` (-1: the null prompt)."""
        read = None if self.texts is None else self.texts.read(numbers, latents.device)
        grid = self.value.features(latents, sigma, read)
        return {name: rows_of(resample(branch.layer.linear(grid), branch.layer.side))
                for name, branch in _branches(self.value).items()}  # fmt: skip


@torch.no_grad()
def transfer(
    teacher: Teacher,
    backbone: Backbone,
    rewards: Mapping[str, Reward],
    batches: Batches,
    read: Condition | None,
    *,
    weights: Sequence[float] | None = None,
    progress: bool = True,
) -> StitchedValue:
    """The teacher's tails behind the features of ``backbone``, cut after that block of the teacher's ``cuts`` whose
    features leave the least of its layers' unexplained on the latents of stage 2's first ``batches``.

    ``read`` is the backbone's condition of all prompts, where its head is to read them.
    """
    cuts, taps, null = teacher.cuts, teacher.taps, backbone.null_condition()
    texts = Texts.of(null, read)
    sides = {name: branch.layer.side for name, branch in _branches(teacher.value).items()}
    statistics = {cut: {name: RegressionStatistics() for name in sides} for cut in cuts}
    steps = -(-FITTED // batches.settings.batch_size)
    for step in track(range(steps), "transfer", steps, progress):
        batch = {name: tensor.to(backbone.device) for name, tensor in batches(step).items()}
        own = texts.read(batch[PROMPT], backbone.device)
        targets = teacher.targets(batch["noisy"], batch["sigma"], batch[PROMPT])
        noisy = backbone.noisy(batch["noisy"], batch["sigma"])
        for cut, grid in features_by_cut(backbone, noisy, own, cuts, taps):
            for name, target in targets.items():
                statistics[cut][name].add(rows_of(resample(grid, sides[name])), target)
    maps = {cut: {name: found.solve() for name, found in each.items()} for cut, each in statistics.items()}
    unexplained = {cut: sum(one.unexplained for one in each.values()) / len(each) for cut, each in maps.items()}
    best = min(unexplained, key=unexplained.__getitem__)
    found = StitchedValue(
        Head(backbone, best, taps_before(taps, best)), _taken_over(teacher.value, maps[best]), null,
        teacher.value.weights if weights is None else weights, rewards,
    )  # fmt: skip
    left = {str(cut): round(share, 6) for cut, share in unexplained.items()}
    made = {"path": teacher.path, "unexplained": left, **attrs.asdict(teacher.value.provenance)}
    found.provenance = Provenance(search={"transfer_from": made})
    return found


def _taken_over(value: StitchedValue, maps: Mapping[str, AffineMap]) -> dict[str, Branch]:
    """The value's branches behind new linear maps; what follows them is the value's own."""
    found = {}
    for name, branch in _branches(value).items():
        layer = StitchingLayer(maps[name].weight.shape[1], len(maps[name].bias), branch.layer.side)
        layer.down.load_state_dict(branch.layer.down.state_dict())
        layer.up.load_state_dict(branch.layer.up.state_dict())
        layer.load_map(maps[name].weight, maps[name].bias)
        found[name] = Branch(layer.to(value.device), branch.tail).requires_grad_(True)
    return found


def _branches(value: StitchedValue) -> dict[str, Any]:
    return dict(zip(value.names, value.branches, strict=True))
