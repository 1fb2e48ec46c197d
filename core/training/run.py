"""Training a backbone towards a high value: one trainer for every method (paper, section 6).

An update draws prompts, lets the method collect what it learns from, and takes optimiser steps on its loss. All
randomness comes from ``(seed, update, sample)``: see :mod:`stitchvm.core.training.problem`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..alignment.given import Value, checked_prompts, latent_size, resolve_method, resolve_value, reward_condition
from ..backbone import Backbone
from ..costs import KINDS, CostMeter, differentiating
from ..datasets import Judge
from ..errors import ConfigError, NonFiniteError
from ..estimators import Estimator, Stitched, Sum, Tweedie
from ..files import make_folder
from ..joint import AnyReward, GivenReward, load_judges
from ..loading import load_backbone
from ..processes import join_group
from ..progress import track
from ..sampling import guided
from ..seeds import stream_seed
from ..sharding import is_shared, own_share, process_mesh, whole
from ..structuring import structure
from ..validators import checked_whole
from .evaluation import Gallery
from .policy import Policy
from .problem import Experience, Rows, TrainingMethod, TrainProblem, Update
from .settings import TrainSettings, as_launched
from .state import TrainingRecord, TrainingState


@attrs.frozen(eq=False)
class TrainResult:
    """What :func:`train` returns: the ``policy`` with its averaged weights, and the ``record`` of the run."""

    policy: Policy
    record: TrainingRecord


def train(
    method: str | TrainingMethod,
    backbone: str | Backbone,
    value: Value,
    prompts: Sequence[str],
    *,
    out: str | Path,
    training: TrainSettings | Mapping[str, Any] | None = None,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 1.0,
    embedded_guidance: float | None = None,
    resolution: int | tuple[int, int] | None = None,
    reward: GivenReward | None = None,
    held_out_rewards: str | AnyReward | Sequence[str | AnyReward] = (),
    judges: Mapping[str, Judge] | None = None,
    evaluation_prompts: Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a LoRA of ``backbone`` (or all of it) so that samples of ``prompts`` have a high value.

    ``method``: a registered name (``draft``, ``diffusion-nft`` ..) with its own ``settings`` as further keywords, or a
    ready object. ``value``: what is maximised where a rollout stops, a stitched value model (or its folder) or another
    estimator; None for the clean ``reward`` at the end of full rollouts. ``reward``: the value's own by default; the
    sum of several names, or of their weights by name (``{"hpsv2": 1, "clip-vit-l-14": 0.5}``). ``held_out_rewards`` are
    never trained on: they are evaluated beside the trained one, and a fall of theirs is warned of (reward hacking); so
    are ``judges`` of finished images, by name (a detector: ``judge(images, prompts) -> [P]``). Evaluation samples
    ``evaluation_prompts`` (by default the first 16 of ``prompts``) with averaged weights, always from the same noise;
    scores that are not finite are left out, with a warning. ``guidance_scale`` and ``embedded_guidance`` as in
    :func:`~stitchvm.core.align`, but for the default of no classifier-free guidance.

    ``out`` gets ``train.json`` (settings, versions, cost, history), ``training.png``, image grids, and what plain
    diffusers loads: ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(out)``. ``best`` has the same of
    the evaluation with the highest mean of ``reward`` (itself, whatever ``value`` was maximised).
    A run that was killed goes on from its last checkpoint there to the same weights, bit for bit on one process; with
    another ``learning_rate``, ``clip_norm`` or ``ema_decay`` if asked, which is warned of and put down.
    Under ``accelerate launch``, processes share every update's prompts, and a backbone's name is loaded on the GPU of
    each.

    Raises :class:`ConfigError` for bad settings, those of another run in ``out`` and a backbone on another GPU than its
    process's, ``ArtefactError`` for a damaged checkpoint, ``OutputError`` when ``out`` cannot be written,
    :class:`NonFiniteError` when the loss, a gradient or a weight is not finite, or no sample of an evaluation is (the
    last checkpoint is kept).
    """
    checked_whole("steps", steps, 1)
    checked_whole("seed", seed, 0)
    network, guidance_scale = guided(load_backbone(backbone), guidance_scale, embedded_guidance)
    folder = Path(out).expanduser()
    estimator, judge = resolve_value(value, reward, network, seed)
    trainer = resolve_method(method, settings)
    _check_complete(trainer)
    plan = as_launched(training_settings(trainer, training))
    texts, size = checked_prompts(prompts), latent_size(network, resolution)
    accelerator = _accelerator(plan, network, folder)
    if plan.prompts_per_update % accelerator.num_processes:
        raise ConfigError(
            f"prompts_per_update is {plan.prompts_per_update}, which {accelerator.num_processes} processes cannot "
            "share equally; give a multiple."
        )
    policy = Policy.of(network, plan.lora, seed, _mesh(plan, accelerator))
    policy.backbone.gradient_checkpointing = plan.gradient_checkpointing
    if plan.head == "policy":
        estimator = _over_policy(estimator, policy)
    problem = TrainProblem(
        policy, network, estimator or Tweedie(judge), network.encode_prompts(list(texts)),
        reward_condition(judge, texts), network.null_condition(), network.sigmas(steps, size).to(network.device),
        (network.latent_channels, *size), guidance_scale, seed,
        plan.batch, policy.another() if trainer.needs_old else None, accelerator.gather,
        finished_only=estimator is None, process=(accelerator.process_index, accelerator.num_processes),
    )  # fmt: skip
    trainer.check(problem)
    rewards = [judge, *load_judges(held_out_rewards, network.device)]
    gallery = Gallery.of(problem, checked_prompts(evaluation_prompts or texts[:16]), rewards, judges)
    run = _Run(problem, trainer, plan, gallery, accelerator, make_folder(folder), len(texts))
    return run.go(method if isinstance(method, str) else type(method).__name__, texts, progress)


def _over_policy(estimator: Estimator | None, policy: Policy) -> Estimator:
    """A stitched value, or a sum of such, whose heads read the policy's blocks."""
    if isinstance(estimator, Stitched) and policy.mesh is None:
        return Stitched(estimator.value.over(policy.backbone))
    if isinstance(estimator, Sum):
        return Sum([_over_policy(part, policy) for part in estimator.estimators], estimator.weights)
    raise ConfigError("head is 'policy', which is for stitched values in unsharded trainings; leave it at 'frozen'.")


def _check_complete(method: object) -> None:
    """:class:`ConfigError` for what lacks a part of a training method."""
    parts = ("needs_old", "samples_per_prompt", "check", "collect", "loss", "updated")
    missing = [name for name in parts if not hasattr(method, name)]
    if "collect" in missing:
        raise ConfigError(f"{type(method).__name__} steers samples and trains nothing; use align.")
    if missing:
        raise ConfigError(
            f"{type(method).__name__} lacks {', '.join(missing)} of a training method; see core.TrainingMethod."
        )


def training_settings(method: TrainingMethod, given: TrainSettings | Mapping[str, Any] | None) -> TrainSettings:
    """The settings as they are, or of a mapping, where the method's own defaults come before the others'."""
    if isinstance(given, TrainSettings):
        return given
    own = getattr(method, "training_defaults", {})
    return structure(TrainSettings, {**own, **(given or {})}, "settings of the training")


def _accelerator(plan: TrainSettings, network: Backbone, out: Path) -> Accelerator:
    """Of this process; :class:`ConfigError` for a tracker that is unknown or not installed, and what
    :func:`join_group` raises."""
    try:
        installed = filter_trackers([plan.tracker], str(out)) if plan.tracker is not None else [None]
    except ValueError as error:
        raise ConfigError(f"tracker is {plan.tracker!r}: {error}") from error
    if not installed:
        raise ConfigError(
            f"the tracker {plan.tracker!r} is not installed: pip install 'stitchvm[train]' has tensorboard; or set "
            "tracker to null."
        )
    return join_group(network.device, log_with=plan.tracker, project_dir=str(out))


def _mesh(plan: TrainSettings, accelerator: Accelerator) -> DeviceMesh | None:
    """What the network is shared out over, if it is; :class:`ConfigError` for a single process."""
    if not plan.shard:
        return None
    if accelerator.num_processes == 1:
        raise ConfigError(
            "shard is set, but there is one process; start several with accelerate launch --num_processes N -m "
            "stitchvm.core.cli align .., or set it to false."
        )
    return process_mesh(accelerator.device, accelerator.num_processes)


@attrs.define(eq=False)
class _Run:
    """One call of :func:`train`, checked."""

    problem: TrainProblem
    method: TrainingMethod
    plan: TrainSettings
    gallery: Gallery
    accelerator: Accelerator
    folder: Path
    prompts: int

    def go(self, name: str, texts: Sequence[str], progress: bool) -> TrainResult:
        policy = self.problem.policy
        optimiser = torch.optim.AdamW(
            policy.parameters.values(), lr=self.plan.learning_rate, weight_decay=self.plan.weight_decay
        )
        state = TrainingState.begin(self.folder, policy, self.problem.old, optimiser, self.plan.ema_decay)
        about = TrainingRecord.about(name, self.method, self.plan, self.problem, self.gallery, texts)
        record = state.restore(about, self.plan.updates)
        record.check_evaluated(self.gallery.names, self.folder)
        if self.plan.tracker is not None:
            self.accelerator.init_trackers("stitchvm", config=_flat(record.settings))
        main = self.accelerator.is_main_process
        if record.due(record.updates, self.plan):  # it is new, or was killed while it was evaluated
            self._evaluate(state, record, record.updates)
        elif record.best["update"] == record.updates:
            state.save_best(write=main)  # it was killed before, perhaps
        left = range(record.updates, self.plan.updates)
        for number in track(left, name, len(left), progress and main):
            with CostMeter() as cost, state.telling_what_is_kept():
                figures = self._update(number, optimiser)
            state.average(number)
            record.add(figures, self._over_all(cost.passes), cost.seconds)
            self.accelerator.log(figures, step=number + 1)
            if record.due(number + 1, self.plan):
                self._evaluate(state, record, number + 1)
            elif (number + 1) % self.plan.checkpoint_every == 0:
                state.save(record, write=main)
        for tracker in self.accelerator.trackers:
            tracker.finish()  # not end_training, which would leave the process group unusable for what comes next
        policy.load(state.averages.tensors())
        policy.save(self.folder, write=main)
        if main:
            record.write(self.folder)
        return TrainResult(policy, record)

    def _evaluate(self, state: TrainingState, record: TrainingRecord, number: int) -> None:
        """With averaged weights, which are kept if they are the best so far; every process does, as all hold the same.

        The checkpoint is written in between: after it is known that these weights can be sampled, so that a training
        that has diverged keeps an earlier one to go on from, and before any judge, whose failure costs no update.
        """
        main = self.accelerator.is_main_process
        with state.telling_what_is_kept():
            drawn = self.gallery.draw(self.problem, state.averages.backbone, number)
        if number > 0 and state.saved != number:
            state.save(record, write=main)
        found = self.gallery.judge(self.problem, drawn, record.evaluations)
        report = found.report(number, record)
        record.evaluations.append(report)
        # said by one for all, who must save together: their numbers may differ in the last digit
        best = float(self._summed(torch.tensor(float(main and record.best is report), device=self.problem.device)))
        told = {**report["rewards"], **report.get("parts", {})}.items()
        means = {f"evaluation/{name}": entry["mean"] for name, entry in told if entry["mean"] is not None}
        self.accelerator.log(means, step=number)
        if main:
            found.save(self.folder / "grids" / f"{number:05d}.png")
            record.write(self.folder)
        if number > 0 and (best > 0 or number == self.plan.updates):  # or else going on from there evaluates again
            state.save(record, write=main)
        if best > 0:  # never ahead of the checkpoint, from which a run may go on with other settings
            state.save_best(write=main)

    def _update(self, number: int, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """Collect, and take the optimiser's steps; the figures to log."""
        figures: dict[str, float] = {}
        with self._precision():
            experience = self.method.collect(self.problem, self._drawn(number))
        for _ in range(self.plan.inner_updates):
            figures = self._step(experience, optimiser, number)
        if not self._everywhere(all(bool(own_share(p).isfinite().all()) for p in self._parameters())):
            raise NonFiniteError(f"a weight is not finite after update {number}; lower the learning rate.")
        self.method.updated(self.problem, number)
        share = 1 / self.accelerator.num_processes  # all have as many samples
        return self._added({name: figure * share for name, figure in experience.figures.items()}) | figures

    def _drawn(self, number: int) -> Update:
        """This process's prompts: the next of a list that is shuffled anew each time it is through."""
        each = self.plan.prompts_per_update
        mine = range(self.accelerator.process_index, each, self.accelerator.num_processes)
        wanted = [divmod(number * each + place, self.prompts) for place in mine]
        orders = {epoch: torch.randperm(self.prompts, generator=_shuffling(self.problem.seed, epoch))
                  for epoch, _ in wanted}  # fmt: skip
        return Update(number, tuple(int(orders[epoch][position]) for epoch, position in wanted), tuple(mine))

    def _step(self, experience: Experience, optimiser: torch.optim.Optimizer, number: int) -> dict[str, float]:
        """One optimiser step on the mean loss over the rows of all processes."""
        total = float(self._summed(torch.tensor(float(len(experience)), device=self.problem.device)))
        sums: defaultdict[str, float] = defaultdict(float)
        with differentiating():
            for rows, counts in self._in_step(experience):
                with self._precision():
                    losses, figures = self.method.loss(self.problem, rows)
                # not Accelerate's backward: what a launcher says of precision and accumulation would scale it
                (losses.sum() * (counts / total)).backward()
                for name, figure in ({"loss": float(losses.detach().mean())} | figures).items():
                    sums[name] += figure * counts * len(rows) / total
        told = self._added(sums)
        if not math.isfinite(told["loss"]):
            raise NonFiniteError(f"the loss is {told['loss']} at update {number}; lower the learning rate.")
        parameters = self._parameters()
        self._join_gradients(parameters)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.plan.clip_norm or math.inf)))
        if not math.isfinite(norm):  # clipped by one that is infinite, every gradient would be 0 from now on
            raise NonFiniteError(f"the norm of the gradient is {norm} at update {number}; lower the learning rate.")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return told | {"gradient_norm": norm}

    def _in_step(self, experience: Experience) -> Iterator[tuple[Rows, float]]:
        """The batches, each counting 1. Processes that share a network pass through it together, so one that has fewer
        of them repeats its last, counting 0."""
        own = most = -(-len(experience) // self.plan.batch)
        if self.problem.policy.mesh is not None:
            most = int(self.accelerator.gather(torch.tensor([own], device=self.problem.device)).max())
        for rows in experience.batches(self.plan.batch, self.problem.device):
            yield rows, 1.0
        for _ in range(most - own):
            yield rows, 0.0

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.problem.policy.parameters.values())

    def _everywhere(self, fine: bool) -> bool:
        """Whether all processes are fine: one that stopped alone would leave the others waiting."""
        return float(self._summed(torch.tensor(float(not fine), device=self.problem.device))) == 0

    def _precision(self) -> torch.autocast:
        """Not Accelerate's own: that of a process's first training would hold for all later ones."""
        return torch.autocast(
            self.problem.device.type, dtype=torch.bfloat16, enabled=self.plan.mixed_precision == "bf16",
            cache_enabled=False,  # a weight cast without gradient in a rollout would serve the steps that have one
        )  # fmt: skip

    def _summed(self, tensor: Tensor) -> Tensor:
        found: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return found

    def _added(self, figures: Mapping[str, float]) -> dict[str, float]:
        """What all processes have, added up."""
        if self.accelerator.num_processes == 1:
            return dict(figures)
        names = sorted(figures)
        own = torch.tensor([figures[name] for name in names], dtype=torch.float64, device=self.problem.device)
        return dict(zip(names, self._summed(own).tolist(), strict=True))

    def _over_all(self, passes: Mapping[str, int]) -> Counter[str]:
        """The passes of all processes."""
        counts = self._summed(torch.tensor([float(passes.get(kind, 0)) for kind in KINDS], device=self.problem.device))
        return Counter({kind: int(count) for kind, count in zip(KINDS, counts.tolist(), strict=True)})

    def _join_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up what the processes found: each has divided by the rows of all. Where the network is sharded, backward
        has taken their mean already."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in parameters:
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = own * self.accelerator.num_processes if is_shared(own) else self._summed(own)


def _shuffling(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, epoch, 0, 0, 0, 0))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a tracker takes them: one table of numbers and texts, under dotted names."""
    found: dict[str, Any] = {}
    for name, entry in table.items():
        simple = entry is None or isinstance(entry, str | int | float)
        found |= (
            _flat(entry, f"{prefix}{name}.") if isinstance(entry, Mapping)
            else {prefix + name: entry if simple else str(entry)}
        )  # fmt: skip
    return found
