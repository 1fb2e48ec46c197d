"""What a value is worth along the generator's own samples: ranking, calibration, gradient and cost by noise level.

Calibration is the regression of a sample's final reward on the value at ``z_t``: a value that is ``E[r(z0) | z_t]`` has
slope 1 and bias 0 where trajectories go on by ``p(z0 | z_t)``, the forward process reversed: :class:`Ancestral`, or
:class:`Sde` with that process's own ``g``. Other kernels keep the marginals, and with them the bias of 0, but not the
coupling of ``z_t`` and ``z0``: the less noise they put back, the more is settled at ``z_t`` and the higher the slope,
up to that of the ODE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..alignment.given import check_latents, checked_prompts, estimator_identity, latent_size, prompts_digest
from ..backbone import Backbone
from ..comparison import mean_stderr, paired_gain, paired_share
from ..datasets import Judge
from ..errors import ConfigError, NonFiniteError
from ..estimators import Estimator
from ..files import cache_key, make_folder
from ..joint import AnyReward, GivenReward, load_judge
from ..kernels import Ancestral, Kernel, Ode
from ..loading import load_backbone
from ..provenance import network_identity, sampled_identity, versions
from ..sampling import chosen_guidance, guided
from ..validators import whole_from
from .gradients import Gradients, compare_gradients, per_latent
from .ranking import SIGMAS, Ranking, Trajectories, differing

Figure = tuple[float | None, float | None]
"""A figure and its standard error; None where there is none (a slope on constant values, an error from one prompt)."""


def _levels(instance: object, attribute: attrs.Attribute[Any], value: tuple[float, ...]) -> None:
    if not value or not all(0 <= level <= 1 for level in value):
        raise ConfigError(f"diagnose: sigmas is {list(value)}; give noise levels from 0 (clean) to 1, at least one.")


@attrs.frozen(kw_only=True)
class DiagnosisSettings:
    """How much is measured, see :func:`diagnose`; all but ``batch`` decides the result.

    Raises :class:`ConfigError` for a number out of its range.
    """

    seeds: int = attrs.field(default=12, validator=whole_from(2))
    steps: int = attrs.field(default=28, validator=whole_from(1))
    guidance_scale: float | None = None
    sigmas: tuple[float, ...] = attrs.field(default=SIGMAS, validator=_levels)
    gradients: bool = True
    gradient_rollouts: int = attrs.field(default=64, validator=whole_from(2))
    gradient_prompts: int = attrs.field(default=4, validator=whole_from(1))
    gradient_seeds: int = attrs.field(default=2, validator=whole_from(1))
    rollout_steps: int = attrs.field(default=8, validator=whole_from(1))
    resolution: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_from(1)))
    seed: int = attrs.field(default=0, validator=whole_from(0))
    batch: int = attrs.field(default=64, validator=whole_from(1))


@attrs.frozen(eq=False)
class Diagnosis:
    """``ranking``: values and final rewards of every trajectory, and costs; ``gradients`` None where not measured;
    ``settings``: everything that decides the result, JSON-able."""

    ranking: Ranking
    gradients: Gradients | None
    settings: dict[str, Any]
    versions: dict[str, str] = attrs.field(factory=versions)

    def figures(self, name: str) -> dict[str, list[Figure]]:
        """Of one estimator, a :data:`Figure` a noise level: ``rank``, ``slope``, ``intercept``, ``bias``,
        ``within_slope`` and, where measured, ``cosine``."""
        ranks = [mean_stderr(level.tolist()) for level in self.ranking.correlations(name)]
        levels = [calibration(values, self.ranking.rewards) for values in self.ranking.values[name]]
        found: dict[str, list[Figure]] = {"rank": [(level.mean, level.stderr) for level in ranks]}
        found |= {figure: [level[figure] for level in levels] for figure in levels[0]}
        if self.gradients is not None:
            cosines = [mean_stderr(level.mean(1)) for level in self.gradients.cosines[name]]
            found["cosine"] = [(level.mean, level.stderr) for level in cosines]
        return found

    def beside(self, name: str, other: str) -> dict[str, list[Figure]]:
        """How an estimator ranks beside another on the same trajectories, a :data:`Figure` a noise level: the
        ``difference`` of their ranks, and its rank as a ``share`` of the other's; paired by prompt, whose errors in
        common cancel."""
        levels = list(zip(*(self.ranking.correlations(each) for each in (name, other)), strict=True))
        gains = [paired_gain(*level) for level in levels]
        shares = [paired_share(*level) for level in levels]
        return {
            "difference": [(gain.mean, gain.stderr) for gain in gains],
            "share": [(None, None) if share is None else (share.mean, share.stderr) for share in shares],
        }

    def judgement(self, judge: str) -> dict[str, Any]:
        """How well values foresee what ``judge`` will say, JSON-able: ``mean`` of what it says, ``rank`` of the final
        reward, ``ranks`` of every estimator by level (each ``mean`` and ``stderr`` over prompts), and the
        ``constant_prompts`` that no rank is of, as it says the same of all their seeds; ranks are None if all are.
        """
        said = self.ranking.judged[judge]
        kept = differing(said)
        found = {"mean": mean_stderr(said.mean(1)).report(), "constant_prompts": int((~kept).sum())}
        if not bool(kept.any()):
            return {**found, "rank": None, "ranks": None}
        ranks = {name: [mean_stderr(level).report() for level in self.ranking.judged_correlations(name, judge)]
                 for name in self.ranking.values}  # fmt: skip
        return {**found, "rank": mean_stderr(self.ranking.reward_correlations(judge)).report(), "ranks": ranks}

    def report(self) -> dict[str, Any]:
        """JSON-able: ``sigma[]`` and, for every estimator, its figures and ``NAME_stderr``, a list by level each, its
        ``cost`` of one latent and the figures ``beside`` every other estimator (:meth:`beside`); ``judges``: each one's
        :meth:`judgement`; ``reference`` is what gradients are compared with."""
        ranking, gradients = self.ranking, self.gradients
        each = ranking.rewards.numel() * len(set(ranking.sigmas))
        table: dict[str, Any] = {}
        for name in ranking.values:
            table[name] = _columns(self.figures(name))
            table[name]["beside"] = {
                other: _columns(self.beside(name, other)) for other in ranking.values if other != name
            }
            table[name]["cost"] = {"forward": per_latent(ranking.costs[name], each)}
            if gradients is not None:
                table[name]["cost"]["gradient"] = per_latent(gradients.costs[name], gradients.latents)
        return {
            "sigma": list(ranking.sigmas), "requested": list(ranking.requested), "prompts": len(ranking.rewards),
            "seeds": ranking.rewards.shape[1], "constant_prompts": int((~ranking.ranked).sum()),
            "reward": mean_stderr(ranking.rewards.mean(1)).report(), "estimators": table,
            "judges": {name: self.judgement(name) for name in ranking.judged},
            "reference": None if gradients is None else gradients.reference(), "generation": ranking.generation,
            "settings": self.settings, "seed": self.settings["seed"], "versions": self.versions,
        }  # fmt: skip


def _columns(figures: Mapping[str, Sequence[Figure]]) -> dict[str, Any]:
    """Each figure and ``NAME_stderr``, a list by level."""
    found: dict[str, Any] = {}
    for figure, levels in figures.items():
        found[figure], found[f"{figure}_stderr"] = map(list, zip(*levels, strict=True))
    return found


def diagnose(
    backbone: str | Backbone,
    estimators: Mapping[str, Estimator],
    reward: GivenReward,
    prompts: Sequence[str],
    *,
    kernel: Kernel | None = None,
    seeds: int = 12,
    steps: int = 28,
    guidance_scale: float | None = None,
    embedded_guidance: float | None = None,
    sigmas: Sequence[float] = SIGMAS,
    gradients: bool = True,
    gradient_rollouts: int = 64,
    gradient_prompts: int = 4,
    gradient_seeds: int = 2,
    rollout_steps: int = 8,
    rollout_kernel: Kernel | None = None,
    resolution: int | None = None,
    seed: int = 0,
    batch: int = 64,
    judges: Mapping[str, Judge] | None = None,
    work: str | Path | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Follow ``seeds`` samples of every prompt under ``kernel`` (default: ``Ode()``) and measure each estimator at the
    steps closest to ``sigmas``.

    Values are compared with the final reward of the same trajectory; an estimator is given the trajectory's own
    prediction, as when steering. Its gradient is compared, at the latents of the first ``gradient_seeds`` seeds of the
    first ``gradient_prompts`` prompts, with that of a Monte Carlo estimate of ``gradient_rollouts`` rollouts of
    ``rollout_steps`` steps, whose noise no estimator sees. These rollouts run under ``rollout_kernel`` whatever
    ``kernel``: by default ``Ancestral()``, which samples ``p(z0 | z_t)`` and has its mean right at any number of steps
    where the denoiser is linear; under the ODE all rollouts from one ``z_t`` are the same. ``guidance_scale`` and
    ``embedded_guidance`` as in :func:`~stitchvm.core.align`; ``resolution`` in pixels, the backbone's own by default.
    ``batch`` bounds the samples of one network pass and changes nothing else; a gradient through a rollout keeps the
    graphs of all its steps. ``judges`` of the finished pictures, such as a detector, are measured beside: a value may
    foresee the reward and not what it stands for. What an interrupted diagnosis has read is kept in the folder
    ``work``, where one with the same settings goes on.

    Raises :class:`ConfigError` for no prompt or estimator, a setting out of its range, a value model that cannot read
    the backbone's latents, rewards that are all the same within each prompt or an estimator without a gradient, and
    :class:`NonFiniteError` for a value, reward or gradient that is not finite.
    """
    network, _ = guided(load_backbone(backbone), guidance_scale, embedded_guidance)
    judge = load_judge(reward, network.device)
    settings = DiagnosisSettings(
        seeds=seeds, steps=steps, guidance_scale=guidance_scale, sigmas=tuple(sigmas), gradients=gradients,
        gradient_rollouts=gradient_rollouts, gradient_prompts=gradient_prompts, gradient_seeds=gradient_seeds,
        rollout_steps=rollout_steps, resolution=resolution, seed=seed, batch=batch,
    )  # fmt: skip
    kernel, rollout_kernel, judges = kernel or Ode(), rollout_kernel or Ancestral(), judges or {}
    known = diagnosis_settings(network, estimators, judge, prompts, settings, kernel, rollout_kernel, tuple(judges))
    for estimator in estimators.values():
        check_latents(estimator, network)
    trajectories = Trajectories(
        backbone=network, reward=judge, prompts=tuple(prompts), seeds=seeds, steps=steps, sigmas=settings.sigmas,
        guidance_scale=known["guidance_scale"], resolution=resolution, seed=seed, batch=batch, kernel=kernel,
    )  # fmt: skip
    folder = None if work is None else make_folder(Path(work) / cache_key(known))
    ranking = trajectories.follow(estimators, f"trajectories, {known['kernel']}", progress, judges, folder)
    _check_finite(ranking)
    compared = None
    if gradients:
        compared = compare_gradients(
            trajectories, estimators, min(gradient_prompts, len(prompts)), min(gradient_seeds, seeds),
            gradient_rollouts, rollout_steps, rollout_kernel, progress, folder,
        )  # fmt: skip
    return Diagnosis(ranking, compared, known)


def diagnosis_settings(
    backbone: Backbone,
    estimators: Mapping[str, Estimator],
    reward: AnyReward,
    prompts: Sequence[str],
    settings: DiagnosisSettings,
    kernel: Kernel,
    rollout_kernel: Kernel,
    judges: Sequence[str],
) -> dict[str, Any]:
    """All that decides a diagnosis, JSON-able: what a result to be kept must share.

    Raises :class:`ConfigError` for no estimator, prompts that are no list of strings, and what the backbone cannot
    sample: a resolution, or a guidance scale.
    """
    if not estimators:
        raise ConfigError(
            "diagnose: no estimators were given; name at least one, such as {'tweedie': Tweedie(reward)}."
        )
    texts, scale = checked_prompts(prompts), chosen_guidance(backbone, settings.guidance_scale)
    latent_size(backbone, settings.resolution)
    named = {name: [estimator_identity(each), repr(getattr(each, "kernel", None))] for name, each in estimators.items()}
    found = {
        **attrs.asdict(settings, filter=lambda field, _: field.name != "batch"), "backbone": _drawn_by(backbone),
        "reward": network_identity(reward), "guidance_scale": float(scale), "estimators": named,
        "kernel": repr(kernel), "rollout_kernel": repr(rollout_kernel), "judges": list(judges),
        "prompts": prompts_digest(texts),
    }  # fmt: skip
    return dict(json.loads(json.dumps(found, default=repr)))


def _drawn_by(backbone: Backbone) -> dict[str, Any]:
    """The sampling network; its embedded guidance only where that is not the registered model's, so that diagnoses from
    before it was told are still known."""
    registered = None if backbone.record is None else backbone.record.architecture.get("guidance")
    return network_identity(backbone) if backbone.guidance == registered else sampled_identity(backbone)


def _check_finite(ranking: Ranking) -> None:
    if not bool(ranking.rewards.isfinite().all()):
        raise NonFiniteError("a final reward is not finite; check the reward, the guidance and the number of steps.")
    for name, table in ranking.values.items():
        for sigma, values in zip(ranking.sigmas, table, strict=True):
            if lost := int((~values.isfinite()).sum()):
                raise NonFiniteError(
                    f"{name} gave no finite value for {lost} of {values.numel()} latents at sigma {sigma:g}; correct "
                    "it, or leave this estimator or noise level out."
                )


def calibration(values: Tensor, rewards: Tensor) -> dict[str, Figure]:
    """How ``values [P, S]`` of ``P`` prompts relate to ``rewards [P, S]``.

    ``slope`` and ``intercept`` of the regression of reward on value over all prompts and seeds, ``bias`` (mean value
    less mean reward), and ``within_slope``, that of both less their prompt's mean. Seeds of a prompt are no independent
    samples, so standard errors treat prompts as the units: sandwich estimates clustered by prompt, with ``P / (P -
    1)``; of few prompts they are too small.
    """
    values, rewards = values.double(), rewards.double()
    within = [table - table.mean(1, keepdim=True) for table in (values, rewards)]
    bias = mean_stderr((values - rewards).mean(1))
    intercept: Figure = (None, None)
    slope, within_slope = intercept, intercept
    if bool(values.amax() > values.amin()):
        intercept, slope = least_squares(torch.stack([torch.ones_like(values), values], -1), rewards)
    if bool((values.amax(1) > values.amin(1)).any()):
        (within_slope,) = least_squares(within[0][..., None], within[1])
    return {"slope": slope, "intercept": intercept, "bias": (bias.mean, bias.stderr), "within_slope": within_slope}


def least_squares(regressors: Tensor, targets: Tensor) -> list[Figure]:
    """Coefficients of ``targets [P, S]`` on ``regressors [P, S, K]`` (float64) and their errors, clustered by ``P``.

    Covariance ``P / (P - 1) A^-1 (sum_p u_p u_p^T) A^-1`` with ``A = X^T X`` and ``u_p = X_p^T e_p`` (Liang and Zeger
    1986).
    """
    clusters = len(targets)
    inverse = torch.linalg.inv(torch.einsum("psk,psl->kl", regressors, regressors))
    found = inverse @ torch.einsum("psk,ps->k", regressors, targets)
    scores = torch.einsum("psk,ps->pk", regressors, targets - regressors @ found)
    if clusters == 1:
        return [(number, None) for number in found.tolist()]
    covariance = clusters / (clusters - 1) * inverse @ scores.T @ scores @ inverse
    return list(zip(found.tolist(), covariance.diagonal().clamp_min(0).sqrt().tolist(), strict=True))
