"""What stage 2 minimises: distillation from the clean reward (paper, section 3), and the order of a prompt's seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..conditions import Condition
from ..reward import Reward, RewardOutput
from .examples import CONDITION
from .finetune_settings import FinetuneSettings
from .levels import Weigh, unweighted

LEAST_SPREAD = 0.01
"""Of a value over the seeds of a prompt, in spreads of their rewards: what counts as not telling them apart."""


def distillation_loss(
    output: RewardOutput,
    target: Mapping[str, Tensor],
    settings: FinetuneSettings,
    score: Tensor | None = None,
    weigh: Weigh = unweighted,
) -> Tensor:
    """Squared l2 between normalised embeddings, plus tokens (mean over tokens, per channel), plus the error of
    ``score [B]``.

    Only the squared score error has ``E[r(z0) | z_t]`` as its minimiser (paper, L_value); the paper's aesthetic recipe
    takes Smooth-l1. The token term is divided by the width, so that its weight means the same for narrow and wide
    towers. ``score`` may cover fewer examples than the rest: those whose target has one (is no NaN), in their order.
    ``weigh`` gives the examples of the other two terms their weights.
    """
    embedding = F.normalize(output.embedding.float(), dim=-1) - F.normalize(target["embedding"], dim=-1)
    tokens = (output.tokens.float() - target["tokens"]).square().mean((1, 2))
    loss = settings.embedding_weight * weigh("embedding", embedding.square().sum(-1)).mean()
    loss = loss + settings.token_weight * weigh("tokens", tokens).mean()
    if score is not None:
        error = F.mse_loss if settings.score_loss == "squared" else F.smooth_l1_loss
        known = target["score"]
        loss = loss + settings.score_weight * error(score.float(), known[~known.isnan()])
    return loss


def hidden_loss(hidden: Sequence[Tensor], clean: Sequence[Tensor], weigh: Weigh = unweighted) -> Tensor:
    """Squared error of the tokens ``[B, N, C]`` after each block, relative to how much the clean image's own tokens
    vary: a number, the mean over examples and blocks (0 is perfect, 1 as bad as the mean token).

    The layer-wise distillation of FitNets and their kin, not in the paper: an error is seen in the block that makes it.
    """
    relative = [
        (tokens.float() - truth).square().mean((1, 2)) / truth.var(dim=1).mean(-1)
        for tokens, truth in zip(hidden, clean, strict=True)
    ]
    return weigh("hidden", torch.stack(relative).mean(0)).mean()


def predicted_score(reward: Reward, output: RewardOutput, target: Mapping[str, Tensor]) -> Tensor | None:
    """The scores of the examples whose target has one, against the condition it was read with; None if none has.

    In float32: two seeds of a prompt may differ by less than a step of bfloat16.
    """
    if "score" not in target or bool(target["score"].isnan().all()):
        return None
    rows = ~target["score"].isnan()
    condition = {key.removeprefix(CONDITION): t[rows] for key, t in target.items() if key.startswith(CONDITION)}
    score = None if output.score is None else output.score[rows]
    read = RewardOutput(output.tokens[rows], output.embedding[rows].float(), score)
    return reward.score(read, Condition(condition)).float()


def ranking_loss(score: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """One minus the mean correlation of ``score`` with ``target`` within each group: 0 to 2, a number.

    Steering compares the seeds of one prompt, whose rewards differ by far less than those of different prompts: an
    error that is small in the distillation terms may still reverse their order, and the correlation sees nothing else.
    ``target [B]`` and ``group [B]`` hold NaN and -1 where an example has none; ``score`` covers the examples with a
    target, in their order. Groups whose targets are all alike have no order and are left out.
    """
    known = ~target.isnan()
    grouped = group[known] >= 0
    value, truth = score.float()[grouped], target[known][grouped]
    _, member = group[known][grouped].unique(return_inverse=True)
    groups = F.one_hot(member).to(value).T
    value, truth = (each - ((groups @ each) / groups.sum(1))[member] for each in (value, truth))
    spread = groups @ truth.square()
    # constant targets leave rounding errors of the mean behind
    ordered = spread > 1e-12
    if not bool(ordered.any()):
        return score.sum() * 0
    # the slope is infinite where a value ignores the seed altogether, or half precision makes two seeds alike
    least = (LEAST_SPREAD**2 * spread).clamp_min(1e-12)
    scale = ((groups @ value.square()).clamp_min(least) * spread.clamp_min(1e-12)).sqrt()
    return 1 - ((groups @ (value * truth)) / scale)[ordered].mean()
