"""The value model: a backbone's head, a stitching layer and a reward's tail, ``V(z_t) = E[r(z0) | z_t]`` (paper,
section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from . import artefact, reuse
from .artefact import Provenance
from .backbone import Backbone, NoisyLatent
from .branch import Branch, Interface
from .conditions import Condition
from .costs import count
from .errors import ArtefactError, ConfigError, SliceError
from .files import read_json
from .joint import Given, JointReward, checked_weights, shares
from .lora import adapters_of
from .provenance import weights_digest
from .reuse import BegunPass
from .reward import ConditionKind, Reward, RewardOutput
from .slicing import Head
from .sources import hub_errors


class StitchedValue(nn.Module, ModelHubMixin, library_name="stitchvm", tags=["stitchvm"]):
    """One head and one branch a reward. ``value(latents, sigma, condition)`` reads noisy latents with the rewards'
    skill.

    The head is frozen and runs under the true noise level and the backbone's null prompt (paper), or, for a model
    that was also trained so (``prompted``), under the prompt that a latent is being denoised for. Several rewards share
    its pass and are summed with ``weights``. The backbone's own text encoders and VAE are not needed.
    """

    def __init__(
        self,
        head: Head,
        branches: Mapping[str, Branch],
        null: Condition,
        weights: Sequence[float] | None = None,
        rewards: Mapping[str, Reward] | None = None,
        provenance: Provenance | None = None,
        *,
        prompted: bool = False,
    ) -> None:
        super().__init__()
        self.prompted = prompted
        self.head = head.requires_grad_(False).eval()
        self._adapters = adapters_of(head.part)
        self.names = tuple(branches)
        self.branches = nn.ModuleList(branches.values())
        self.weights = checked_weights(self.names, weights)
        self.null = null
        self.provenance = provenance or Provenance()
        # a plain dict, so that the clean rewards are neither trained nor saved with the value model
        self._rewards: dict[str, Reward] = dict(rewards or {})

    def save_pretrained(self, save_directory: str | Path, **push: Any) -> str | None:
        """Write the artefact folder (see :mod:`stitchvm.core.artefact`); ``push_to_hub=True`` and ``repo_id`` also
        upload it."""
        artefact.save(self, save_directory)
        if not push.pop("push_to_hub", False):
            return None
        repo_id = push.pop("repo_id", None) or Path(save_directory).name
        return str(self.push_to_hub(repo_id, **push))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """``options``: ``backbone`` (a name or an object to share), ``allow_other_backbone``, ``steers``, ``device``,
        ``dtype``."""
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                    local_files_only=local_files_only, token=token,
                )
            )  # fmt: skip
        return artefact.load(cls, folder, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """A saved value model, from a folder or a hub id; see ``artefact.load`` for ``options``.

        Raises ``ArtefactError`` when there is none, when it is damaged, or when it belongs to another backbone.
        """
        path = Path(pretrained_model_name_or_path).expanduser()
        if not (path / artefact.CONFIG).is_file() and (
            path.exists() or str(path).count("/") != 1 or path.is_absolute()
        ):
            raise ArtefactError(
                f"{str(path)!r} holds no value model ({artefact.CONFIG} is missing). Give a folder that stitch wrote."
            )
        if path.is_dir():
            read_json(path / artefact.CONFIG)  # the mixin would parse it first, and fail less clearly
        try:
            loaded: Self = super().from_pretrained(str(path), **options)
        except hub_errors() as error:
            raise ArtefactError(
                f"there is no folder {str(path)!r} with a value model here, and as a repository of the hub it cannot "
                f"be read: {type(error).__name__}: {error}"
            ) from error
        return loaded

    @property
    def device(self) -> torch.device:
        return next(self.branches.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What its layers and tails compute in; a head cut at the latents has no parameter to ask."""
        return next(self.branches.parameters()).dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``half`` and their like do; the clean rewards go to the same device and keep their precision."""
        moved: Self = super()._apply(fn, recurse)
        for reward in self._rewards.values():
            reward.to(self.device)
        return moved

    def interface(self, name: str | None = None) -> Interface:
        """Where the (first) reward was cut in."""
        return Interface(self.head.cut, self._branch(name or self.names[0]).tail.j)

    def alone(self, name: str) -> StitchedValue:
        """The value of one of several rewards, weight 1, sharing its tensors; ``SliceError`` for an unknown one.

        Rewards stitched together share one set of samples and one pass of the head a training step; what each needs
        for itself is then saved apart with ``save_pretrained``.
        """
        rewards = {name: self._rewards[name]} if name in self._rewards else {}
        return type(self)(
            self.head, {name: self._branch(name)}, self.null, None, rewards, self.provenance, prompted=self.prompted
        )

    def over(self, backbone: Backbone) -> StitchedValue:
        """The same layers and tails over the blocks of another backbone of the same architecture, such as a policy,
        sharing the tensors of both. What of them is trained stays so, and the value's gradient reaches it.

        Raises ``SliceError`` for a backbone that has no such cut.
        """
        trained = [p for p in backbone.net.parameters() if p.requires_grad]
        own = self.head.part
        assert isinstance(own, Backbone)
        if own.guidance is not None:
            backbone = backbone.with_embedded_guidance(own.guidance)
        found = type(self)(
            Head(backbone, self.head.cut, self.head.taps), {name: self._branch(name) for name in self.names}, self.null,
            self.weights, self._rewards, self.provenance, prompted=self.prompted,
        )  # fmt: skip
        for parameter in trained:  # a head of one's own is frozen
            parameter.requires_grad_(True)
        return found

    @classmethod
    def together(cls, values: Sequence[StitchedValue], weights: Sequence[float] | None = None) -> Self:
        """Value models that were stitched apart as one, sharing their tensors and one pass of the head: the inverse of
        :meth:`alone`.

        ``weights``: one a reward, in their order; by default those they have. Raises ``ArtefactError`` where the heads
        are not the same (backbone, cut, taps, prompt, embedded guidance), :class:`ConfigError` for a reward that two of
        them read.
        """
        if not values:
            raise ConfigError("no value model was given; give at least one.")
        first = values[0]
        for other in values[1:]:
            if difference := _other_head(first, other):
                raise ArtefactError(
                    f"the value models of {', '.join(first.names)} and of {', '.join(other.names)} share no head: "
                    f"{difference}. Stitch both to one backbone at one cut, or sum them with Sum."
                )
        names = [name for value in values for name in value.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{', '.join(twice)} is read by more than one of the value models; give it once.")
        branches = {name: value._branch(name) for value in values for name in value.names}
        rewards = {name: reward for value in values for name, reward in value._rewards.items()}
        own = [weight for value in values for weight in value.weights]
        return cls(
            first.head, branches, first.null, own if weights is None else weights, rewards,
            Provenance.of_several({", ".join(value.names): value.provenance for value in values}),
            prompted=first.prompted,
        )  # fmt: skip

    def features(self, latents: Tensor, sigma: float | Tensor, prompt: Condition | None = None) -> Tensor:
        """``[B, C, H, W]`` backbone features under ``prompt`` (the null prompt if None), counted as ``head``.

        Raises :class:`ConfigError` for a prompt when the model was trained under the null prompt alone, and where a
        LoRA was put into the backbone (or taken out) since the model was made: the features would be others.
        """
        if (now := adapters_of(self.head.part)) != self._adapters:
            raise ConfigError(
                f"the value model's backbone has {', '.join(sorted(now)) or 'no LoRA'} in it and had "
                f"{', '.join(sorted(self._adapters)) or 'no LoRA'} when the model was made. Load a model apart from "
                "the pipeline: StitchedValue.from_pretrained(folder), without backbone=."
            )
        if prompt is not None and not self.prompted:
            raise ConfigError("this value model's head reads the null prompt alone; leave the backbone's prompt out.")
        backbone = self.head.part
        assert isinstance(backbone, Backbone)
        x: NoisyLatent = backbone.noisy(latents, sigma)
        if self.head.cut >= 0:
            count("head", len(latents))
        condition = (self.null if prompt is None else prompt).to(latents.device).expand(len(latents))
        if reuse.wanted() and self.head.cut >= 0:
            grid, state = self.head(x, condition, return_state=True)
            reuse.keep(BegunPass.stopped(backbone, x, condition, self.head.cut, state))
        else:
            grid = self.head(x, condition)
        return grid.to(self.dtype)

    def outputs(
        self, latents: Tensor, sigma: float | Tensor, prompt: Condition | None = None
    ) -> dict[str, RewardOutput]:
        """Every reward's output on noisy latents ``[B, C, h, w]``: embeddings for retrieval, tokens for
        distillation."""
        return self.read(self.features(latents, sigma, prompt))

    def read(self, features: Tensor) -> dict[str, RewardOutput]:
        """Every reward's output from the head's features, counted as ``tail``."""
        count("tail", len(features) * len(self.names))
        return {name: branch(features) for name, branch in zip(self.names, self.branches, strict=True)}

    def forward(
        self, latents: Tensor, sigma: float | Tensor, condition: Given = None, *, prompt: Condition | None = None
    ) -> Tensor:
        """``[B]``: the weighted sum of the rewards' values, differentiable in ``latents [B, C, h, w]``.

        ``condition`` is what the rewards compare with: prompts (given once for all rewards that read some), a ready
        condition (both of one sample or B), a mapping from reward name to either, or None for rewards that need none.
        ``prompt`` is the backbone's own condition that the latents are being denoised under, if the model is
        ``prompted``.

        Raises ``SliceError`` for wrong latents, ``NoiseLevelError`` for a sigma outside [0, 1], ``ConfigError`` for a
        missing or surplus condition.
        """
        parts = shares(condition, self._kinds())
        ready = {name: self._ready(name, part) for name, part in parts.items()}  # a mistake here costs no pass
        values = []
        for (name, output), weight in zip(self.outputs(latents, sigma, prompt).items(), self.weights, strict=True):
            own = ready[name].to(latents.device).expand(len(latents))
            values.append(weight * self.scorer(name).score(output, own))
        return torch.stack(values).sum(0)

    def condition(self, condition: Given, name: str | None = None) -> Condition:
        """The (first) reward's part of a condition for all, encoding prompts with its text side."""
        name = name or self.names[0]
        return self._ready(name, shares(condition, self._kinds())[name])

    def objective(self) -> Reward | JointReward:
        """What the value estimates of clean images: the reward, or the weighted sum of several."""
        rewards = {name: self.reward(name) for name in self.names}
        return self.reward() if self.weights == (1.0,) else JointReward(rewards, self.weights)

    def reward(self, name: str | None = None) -> Reward:
        """The clean reward behind the (first) branch."""
        name = name or self.names[0]
        if name not in self._rewards:
            raise ConfigError(f"reward {name!r} is not attached to this value model; pass it when building the model.")
        return self._rewards[name]

    def scorer(self, name: str) -> Reward:
        """One branch's own copy of the reward's tail, whose ``score`` reads that branch's output.

        Raises ``SliceError`` for a reward that is not read here.
        """
        part = self._branch(name).tail.part
        assert isinstance(part, Reward)
        return part

    def _kinds(self) -> dict[str, ConditionKind]:
        return {name: self.scorer(name).condition_kind for name in self.names}

    def _ready(self, name: str, given: Any) -> Condition:
        """One reward's condition; a tail can take a ready one, to encode something needs the whole reward."""
        whole = given is not None and not isinstance(given, Condition)
        return (self.reward(name) if whole else self.scorer(name)).condition(given)

    def _branch(self, name: str) -> Branch:
        if name not in self.names:
            raise SliceError(f"this value model reads {', '.join(self.names)}, not {name!r}.")
        branch = self.branches[self.names.index(name)]
        assert isinstance(branch, Branch)
        return branch


def _other_head(one: StitchedValue, other: StitchedValue) -> str | None:
    """How the heads of two value models differ, or None if they read the same features."""
    for what, ours, theirs in (
        ("cut after block", one.head.cut, other.head.cut),
        ("taps", list(one.head.taps), list(other.head.taps)),
        ("trained under prompts", one.prompted, other.prompted),
        ("embedded guidance", *(value.head.part.guidance for value in (one, other))),
        ("backbone weights", *(weights_digest(value.head.part.net) for value in (one, other))),
    ):
        if ours != theirs:
            return f"{what} {ours} and {theirs}"
    return None if one.null.equals(other.null) else "their null prompts differ"
