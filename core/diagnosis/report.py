"""A diagnosis in a folder: one kernel after the other, each kept as soon as it is done, with JSON and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backbone import Backbone
from ..datasets import Judge
from ..errors import ArtefactError, ConfigError
from ..estimators import Estimator
from ..files import make_folder, read_json, write_json
from ..joint import GivenReward, load_judge
from ..kernels import Ancestral, Kernel
from ..loading import load_backbone
from ..provenance import versions
from ..sampling import guided
from .plots import diagnosis_panels
from .run import DiagnosisSettings, diagnose, diagnosis_settings

REPORT = "diagnosis.json"


def run_diagnosis(
    backbone: str | Backbone,
    estimators: Mapping[str, Estimator],
    reward: GivenReward,
    prompts: Sequence[str],
    out: str | Path,
    *,
    kernels: Mapping[str, Kernel],
    rollout_kernel: Kernel | None = None,
    embedded_guidance: float | None = None,
    batch: int = 64,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """:func:`diagnose` under each of ``kernels``, and what ``diagnosis.json`` holds: ``Diagnosis.report()`` of each
    under ``kernels``, ``seed`` and ``versions``.

    ``settings`` are the others of :class:`DiagnosisSettings`. Writes ``parts/KERNEL.json`` when a kernel is done, which
    is not repeated with the same settings, and ``diagnosis-KERNEL.png``, drawn anew every time; until then what was
    read is kept in ``parts/KERNEL``, and a rerun goes on there. Raises as :func:`diagnose`, and ``OutputError`` when
    ``out`` cannot be written.
    """
    if not kernels:
        raise ConfigError("diagnose: no kernel was given; name at least one, such as {'sde': Sde()}.")
    checked = DiagnosisSettings(batch=batch, **settings)
    network, _ = guided(load_backbone(backbone), checked.guidance_scale, embedded_guidance)
    judge = load_judge(reward, network.device)
    rollout_kernel = rollout_kernel or Ancestral()
    folder = make_folder(out)
    parts = make_folder(folder / "parts")
    found: dict[str, Any] = {}
    for name, kernel in kernels.items():
        path = parts / f"{name}.json"
        known = diagnosis_settings(
            network, estimators, judge, prompts, checked, kernel, rollout_kernel, tuple(judges or {})
        )
        part = _kept(path, known)
        if part is None:
            diagnosis = diagnose(
                network, estimators, judge, prompts, kernel=kernel, rollout_kernel=rollout_kernel, batch=batch,
                judges=judges, work=parts / name, progress=progress, **settings,
            )  # fmt: skip
            part = diagnosis.report()
            write_json(path, part)
            shutil.rmtree(parts / name)
        found[name] = part
        diagnosis_panels(part, name, folder / f"diagnosis-{name}.png")
    report = {"kernels": found, "seed": checked.seed, "versions": versions()}
    write_json(folder / REPORT, report)
    return report


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The part an earlier run with these settings left; None where there is none, or a damaged one."""
    try:
        part = read_json(path)
    except ArtefactError:
        return None
    return part if part.get("settings") == settings else None
