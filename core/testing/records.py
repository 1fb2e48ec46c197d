"""What a plugin's registry record and the class behind it promise."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import subprocess
import sys

from ..backbone import Backbone
from ..discovery import GROUP
from ..loading import build_geometry, build_twin
from ..loading import family_class as class_of
from ..records import AlignerRecord, BackboneRecord, RewardRecord, Source
from ..reward import Reward
from .checks import Subject, check
from .expect import expect, expect_equal, global_randomness_kept

TWIN_PARAMETERS = 1_000_000
"""A twin has fewer parameters: it is run often."""
METHODS = {
    "aligner": ("run(problem)",),
    "trainer": ("collect(problem, update)", "loss(problem, rows)", "updated(problem, number)", "check(problem)"),
}
"""What an alignment method offers, by its kind."""
HEAVY = ("torch", "diffusers", "transformers", "open_clip", "timm")


@check("backbone", "reward", "aligner", "trainer", of_record=True)
def builds(subject: Subject) -> None:
    """It can be made without a download, and is what its kind says."""
    if subject.kind in METHODS:
        hint = "The record's 'trains' says whether a method trains or steers."
        for call in METHODS[subject.kind]:
            offered = callable(getattr(subject.plugin, call.partition("(")[0], None))
            expect(offered, f"a method with {call}", type(subject.plugin).__name__, hint)
        return
    wanted = Backbone if subject.kind == "backbone" else Reward
    found = type(subject.plugin).__name__
    expect(isinstance(subject.plugin, wanted), f"a subclass of {wanted.__name__}", found)


@check("backbone", "reward", of_record=True)
def family_class(subject: Subject) -> None:
    """The family's class can build from an architecture, load weights, and take the pipelines it names."""
    assert isinstance(subject.record, BackboneRecord | RewardRecord)
    cls = class_of(subject.record)
    wanted = {"build": {"device"}, "from_pretrained": {"dtype", "device", "token", "local_files_only"}}
    if subject.kind == "backbone":
        wanted["from_pretrained"].add("cut")
    if subject.family.pipelines:
        wanted["from_pipeline"] = {"record"}
    for name, options in wanted.items():
        method = getattr(cls, name, None)
        expect(callable(method), f"{cls.__name__}.{name}, as BackboneFamily and RewardFamily describe", "none")
        parameters = inspect.signature(method).parameters if callable(method) else {}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        missing = set() if open_ended else options - set(parameters)
        expect(not missing, f"{cls.__name__}.{name} to take {', '.join(sorted(options))}", f"no {sorted(missing)}")


@check("backbone", "reward", of_record=True, table="twin")
def twin(subject: Subject) -> None:
    """The twin is small and the same every time, and building it leaves the process's randomness alone."""
    record = subject.record
    assert isinstance(record, BackboneRecord | RewardRecord)
    expect(bool(record.twin), "a table 'twin' in the record, a small build()", "none")
    with global_randomness_kept("building a twin"):
        first, second = (build_twin(record).state_dict() for _ in range(2))
    for name, tensor in first.items():
        expect_equal(second[name], tensor, f"the same {name} in every twin", "Draw from torch's own generator.")
    size = sum(tensor.numel() for tensor in first.values())
    expect(size < TWIN_PARAMETERS, f"a twin of fewer than {TWIN_PARAMETERS:,} parameters", f"{size:,}")


@check("backbone", "reward", of_record=True, table="architecture")
def geometry(subject: Subject) -> None:
    """The full-size network is built on the meta device, with no memory and no weights."""
    record = subject.record
    assert isinstance(record, BackboneRecord | RewardRecord)
    expect(bool(record.architecture), "a table 'architecture' in the record, the full-size build()", "none")
    network = build_geometry(record)
    real = [name for name, parameter in network.named_parameters() if not parameter.is_meta]
    hint = "build(architecture, device='meta') must make everything under torch.device('meta')."
    expect(not real, "every parameter on the meta device", f"{', '.join(real[:3])} elsewhere", hint)


@check("backbone", "reward", of_record=True)
def licence(subject: Subject) -> None:
    """The record says which licence the weights have."""
    stated = getattr(subject.record, "licence", "unknown").strip()
    expect(stated not in ("", "unknown"), "a licence in the record", repr(stated))


@check("backbone", "reward", "aligner", "trainer", of_record=True)
def light(subject: Subject) -> None:
    """Importing the plugin's module loads no torch, so that listing what is installed stays quick."""
    assert subject.record is not None
    sources = {subject.record.source}
    if not isinstance(subject.record, AlignerRecord):
        sources.add(subject.family.source)
    for source in filter(None, sources):
        loaded = _imports_of(source)
        hint = "Import them where a model is made; a record's 'load' names that module."
        expect(not loaded, f"none of {', '.join(HEAVY)} imported by the plugin of {source}", loaded, hint)


@functools.cache
def _imports_of(source: Source) -> str:
    """Which heavy packages a fresh process has after importing a plugin's module; none for a registry file."""
    if source.level == "inline":
        if not source.origin.endswith(".py"):
            return ""
        code = f"import runpy; runpy.run_path({source.origin!r})"
    else:
        points = importlib.metadata.distribution(source.distribution).entry_points
        modules = [p.module for p in points if p.group == GROUP and p.name == source.origin]
        if not modules:  # a registry file that the distribution ships
            return ""
        code = f"import {modules[0]}"
    code = f"import sys; {code}; print(*(name for name in {HEAVY!r} if name in sys.modules), sep=', ')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    return done.stdout.strip() if done.returncode == 0 else f"an error: {done.stderr.strip().splitlines()[-1]}"
