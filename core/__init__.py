"""StitchVM: value models for diffusion backbones, stitched from their own features and a reward model's tail.

``from stitchvm import core`` and then ``core.stitch("sd3.5-medium", "clip-vit-l-14-336", images=...)``. Every public
name is listed here and imported on first use, so that listing models never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment.callbacks import GuidanceCallback, ResamplingCallback
    from .alignment.particles import Particles, Resampling
    from .alignment.problem import Aligner, AlignProblem, Look
    from .alignment.resampling import RESAMPLERS, effective_sample_size
    from .alignment.result import AlignResult
    from .alignment.run import align
    from .alignment.steering import steer
    from .alignment.swarm import Swarm
    from .alignment.windows import StepUnit, Window, steps_at, steps_within
    from .backbone import Backbone, NoisyLatent
    from .conditions import Condition, concatenate
    from .costs import CostMeter, count
    from .datasets import Captioned, CaptionedDataset, PreferenceDataset, Preferences, Rated, RatedDataset
    from .diagnosis.ranking import Ranking, rank_seeds
    from .diagnosis.run import Diagnosis, diagnose
    from .discovery import PluginFailure
    from .errors import (
        ArtefactError,
        ConfigError,
        DataError,
        NoiseLevelError,
        NonFiniteError,
        OutputError,
        PluginConflictError,
        PluginLoadError,
        SliceError,
        SpecVersionError,
        StitchError,
        UnknownNameError,
        WeightsError,
    )
    from .estimators import Estimator, Prompted, Stitched, Sum, Tweedie, clean_reward
    from .evaluation import evaluate
    from .hookspecs import hookimpl
    from .joint import JointReward
    from .kernels import KERNELS, Ancestral, Cps, Kernel, Ode, OnPath, Sde, Transition
    from .loading import (
        BackboneFamily,
        RewardFamily,
        backbone_from,
        build_geometry,
        build_twin,
        load_aligner,
        load_backbone,
        load_dataset_plugin,
        load_reward,
    )
    from .lora import LoraSettings, with_lora
    from .monte_carlo import MonteCarlo
    from .paths import FlowPath, Path, Prediction, PredictionKind, VariancePreservingPath, as_sigma, spread
    from .planning.run import Plan, plan
    from .records import (
        SPEC_VERSION,
        AlignerRecord,
        BackboneRecord,
        DatasetRecord,
        Family,
        Hint,
        RewardRecord,
        Source,
        name_of,
    )
    from .registries import Registry, pairs, registry
    from .reward import Reward, RewardOutput, Tail
    from .sampling import Denoiser, sample, seeded_noise
    from .slicing import LATENT, FeatureInfo, Head, Sliced, State
    from .sources import resolve_source
    from .stitching.finetune_settings import FinetuneSettings
    from .stitching.recipes import recipe
    from .stitching.run import stitch
    from .stitching.search_result import JointSearch, SearchResult
    from .stitching.searching import search, search_jointly
    from .structuring import with_config_errors
    from .training.policy import Policy
    from .training.problem import Experience, Rows, StopWindow, TrainingMethod, TrainProblem, Update, spread_seed
    from .training.run import TrainResult, train
    from .training.settings import TrainSettings
    from .validators import number_above, number_within, whole_from
    from .value import StitchedValue

# No sub-module may bear the name of a public attribute: importing it would put the module in the attribute's place.
_PUBLIC = {
    "alignment.callbacks": ("GuidanceCallback", "ResamplingCallback"),
    "alignment.particles": ("Particles", "Resampling"),
    "alignment.problem": ("AlignProblem", "Aligner", "Look"),
    "alignment.resampling": ("RESAMPLERS", "effective_sample_size"),
    "alignment.result": ("AlignResult",),
    "alignment.run": ("align",),
    "alignment.steering": ("steer",),
    "alignment.swarm": ("Swarm",),
    "alignment.windows": ("StepUnit", "Window", "steps_at", "steps_within"),
    "backbone": ("Backbone", "NoisyLatent"),
    "conditions": ("Condition", "concatenate"),
    "costs": ("CostMeter", "count"),
    "datasets": ("Captioned", "CaptionedDataset", "PreferenceDataset", "Preferences", "Rated", "RatedDataset"),
    "diagnosis.ranking": ("Ranking", "rank_seeds"),
    "diagnosis.run": ("Diagnosis", "diagnose"),
    "discovery": ("PluginFailure",),
    "errors": (
        "ArtefactError",
        "ConfigError",
        "DataError",
        "NoiseLevelError",
        "NonFiniteError",
        "OutputError",
        "PluginConflictError",
        "PluginLoadError",
        "SliceError",
        "SpecVersionError",
        "StitchError",
        "UnknownNameError",
        "WeightsError",
    ),
    "estimators": ("Estimator", "Prompted", "Stitched", "Sum", "Tweedie", "clean_reward"),
    "evaluation": ("evaluate",),
    "hookspecs": ("hookimpl",),
    "joint": ("JointReward",),
    "kernels": ("KERNELS", "Ancestral", "Cps", "Kernel", "Ode", "OnPath", "Sde", "Transition"),
    "loading": (
        "BackboneFamily",
        "RewardFamily",
        "backbone_from",
        "build_geometry",
        "build_twin",
        "load_aligner",
        "load_backbone",
        "load_dataset_plugin",
        "load_reward",
    ),
    "lora": ("LoraSettings", "with_lora"),
    "monte_carlo": ("MonteCarlo",),
    "paths": ("FlowPath", "Path", "Prediction", "PredictionKind", "VariancePreservingPath", "as_sigma", "spread"),
    "planning.run": ("Plan", "plan"),
    "records": (
        "SPEC_VERSION",
        "AlignerRecord",
        "BackboneRecord",
        "DatasetRecord",
        "Family",
        "Hint",
        "RewardRecord",
        "Source",
        "name_of",
    ),
    "registries": ("Registry", "pairs", "registry"),
    "reward": ("Reward", "RewardOutput", "Tail"),
    "sampling": ("Denoiser", "sample", "seeded_noise"),
    "slicing": ("LATENT", "FeatureInfo", "Head", "Sliced", "State"),
    "sources": ("resolve_source",),
    "stitching.finetune_settings": ("FinetuneSettings",),
    "stitching.recipes": ("recipe",),
    "stitching.run": ("stitch",),
    "stitching.search_result": ("JointSearch", "SearchResult"),
    "stitching.searching": ("search", "search_jointly"),
    "structuring": ("with_config_errors",),
    "training.policy": ("Policy",),
    "training.problem": ("Experience", "Rows", "StopWindow", "TrainProblem", "TrainingMethod", "Update", "spread_seed"),
    "training.run": ("TrainResult", "train"),
    "training.settings": ("TrainSettings",),
    "validators": ("number_above", "number_within", "whole_from"),
    "value": ("StitchedValue",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "KERNELS",
    "LATENT",
    "RESAMPLERS",
    "SPEC_VERSION",
    "AlignProblem",
    "AlignResult",
    "Aligner",
    "AlignerRecord",
    "Ancestral",
    "ArtefactError",
    "Backbone",
    "BackboneFamily",
    "BackboneRecord",
    "Captioned",
    "CaptionedDataset",
    "Condition",
    "ConfigError",
    "CostMeter",
    "Cps",
    "DataError",
    "DatasetRecord",
    "Denoiser",
    "Diagnosis",
    "Estimator",
    "Experience",
    "Family",
    "FeatureInfo",
    "FinetuneSettings",
    "FlowPath",
    "GuidanceCallback",
    "Head",
    "Hint",
    "JointReward",
    "JointSearch",
    "Kernel",
    "Look",
    "LoraSettings",
    "MonteCarlo",
    "NoiseLevelError",
    "NoisyLatent",
    "NonFiniteError",
    "Ode",
    "OnPath",
    "OutputError",
    "Particles",
    "Path",
    "Plan",
    "PluginConflictError",
    "PluginFailure",
    "PluginLoadError",
    "Policy",
    "Prediction",
    "PredictionKind",
    "PreferenceDataset",
    "Preferences",
    "Prompted",
    "Ranking",
    "Rated",
    "RatedDataset",
    "Registry",
    "Resampling",
    "ResamplingCallback",
    "Reward",
    "RewardFamily",
    "RewardOutput",
    "RewardRecord",
    "Rows",
    "Sde",
    "SearchResult",
    "SliceError",
    "Sliced",
    "Source",
    "SpecVersionError",
    "State",
    "StepUnit",
    "StitchError",
    "Stitched",
    "StitchedValue",
    "StopWindow",
    "Sum",
    "Swarm",
    "Tail",
    "TrainProblem",
    "TrainResult",
    "TrainSettings",
    "TrainingMethod",
    "Transition",
    "Tweedie",
    "UnknownNameError",
    "Update",
    "VariancePreservingPath",
    "WeightsError",
    "Window",
    "align",
    "as_sigma",
    "backbone_from",
    "build_geometry",
    "build_twin",
    "clean_reward",
    "concatenate",
    "count",
    "diagnose",
    "effective_sample_size",
    "evaluate",
    "hookimpl",
    "load_aligner",
    "load_backbone",
    "load_dataset_plugin",
    "load_reward",
    "name_of",
    "number_above",
    "number_within",
    "pairs",
    "plan",
    "rank_seeds",
    "recipe",
    "registry",
    "resolve_source",
    "sample",
    "search",
    "search_jointly",
    "seeded_noise",
    "spread",
    "spread_seed",
    "steer",
    "steps_at",
    "steps_within",
    "stitch",
    "train",
    "whole_from",
    "with_config_errors",
    "with_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
