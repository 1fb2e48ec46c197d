"""From names to networks, and what a family's class must offer for it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ConfigError, PluginLoadError, WeightsError
from .records import AlignerRecord, BackboneRecord, DatasetRecord, Family, RewardRecord
from .registries import registry

if TYPE_CHECKING:
    import torch

    from .backbone import Backbone
    from .reward import Reward

    Device = torch.device | str
    DTypeLike = torch.dtype | str

HUB, FOLDER = "hf-hub:", "local-dir:"


class BackboneFamily(Protocol):
    """What the class a backbone :class:`Family` names must offer beside being a :class:`~stitchvm.core.Backbone`."""

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: Device = "cpu") -> Backbone:
        """The network with random weights (none on ``"meta"``), in eval mode and frozen, from a record's table."""
        ...

    @classmethod
    def from_pretrained(
        cls,
        record: BackboneRecord,
        *,
        cut: int | None = None,
        dtype: torch.dtype | None = None,
        device: Device = "cpu",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Backbone:
        """The trained network, in eval mode and frozen; only what a head at ``cut`` needs when ``cut`` is given.

        Raises :class:`WeightsError` for weights that are missing, truncated or of another architecture.
        """
        ...

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, record: BackboneRecord | None = None, **options: Any) -> Backbone:
        """The network inside a loaded pipeline, sharing its modules; only for a family that names ``pipelines``.

        Raises :class:`WeightsError` for a pipeline it cannot use or that contradicts ``record``.
        """
        ...


class RewardFamily(Protocol):
    """What the class a reward :class:`Family` names must offer beside being a :class:`~stitchvm.core.Reward`."""

    @classmethod
    def build(cls, architecture: Mapping[str, Any], *, device: Device = "cpu") -> Reward:
        """As :meth:`BackboneFamily.build`."""
        ...

    @classmethod
    def from_pretrained(
        cls,
        record: RewardRecord,
        *,
        dtype: torch.dtype | None = None,
        device: Device = "cpu",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Reward:
        """As :meth:`BackboneFamily.from_pretrained`, always whole."""
        ...


def load_backbone(
    name: str | BackboneRecord | Backbone,
    *,
    family: str | None = None,
    cut: int | None = None,
    dtype: DTypeLike | None = None,
    device: Device | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Backbone:
    """A backbone by registered name, record, local folder, ``hf-hub:org/repo`` or ``local-dir:/path``.

    A folder or hub id needs its ``family``; a network that is loaded already comes back as it is. ``cut`` loads
    only what a head at that cut needs; ``dtype`` is the record's own unless given, ``device`` the process's GPU, else
    the CPU (:func:`~stitchvm.core.devices.default_device`).

    Raises ``UnknownNameError``, ``PluginLoadError`` (a missing package) or ``WeightsError``.
    """
    from .backbone import Backbone

    if isinstance(name, Backbone):
        return name
    record = name if isinstance(name, BackboneRecord) else _backbone_record(name, family)
    cls: BackboneFamily = family_class(record)
    precision = as_dtype(dtype or record.dtype)
    network = cls.from_pretrained(
        record, cut=cut, dtype=precision, device=_placed(device), token=token, local_files_only=local_files_only
    )
    network.record = record
    return network


def backbone_from(
    pipeline: Any, *, name: str | BackboneRecord | None = None, family: str | None = None, **options: Any
) -> Backbone:
    """The backbone inside a diffusers pipeline that is loaded already: no weight is read or copied.

    Both share their modules, so that what is done to one (moving, casting, training) is done to the other. Latents and
    prompts go through the pipeline's own VAE and text encoders. ``name`` is the registered model that it is, which
    saved value models will refer to; ``family`` decides where several take this class of pipeline. ``options`` are
    the family's own: ``max_sequence_length`` for SD 3 and FLUX, ``guidance`` for FLUX.

    Raises :class:`ConfigError` for something that no family takes, or an unknown option, and :class:`WeightsError` for
    a pipeline that lacks a part, is offloaded, or is not the model that ``name`` says.
    """
    record = registry().backbone(name) if isinstance(name, str) else name
    code = _family_of(pipeline, record.family if record is not None else family)
    _check_installed(code, code.name)
    cls: BackboneFamily = _resolve(code.load, code.name)
    network = cls.from_pipeline(pipeline, record=record, **options)
    network.record = record
    return network


def _family_of(pipeline: Any, family: str | None) -> Family:
    """The family that takes a loaded pipeline, by the names of its class and of those it derives from."""
    families = registry().backbone_families
    if family is not None:
        code = families[family]
        if not code.pipelines:
            raise ConfigError(f"the family {code.name!r} takes no loaded pipeline; load it with load_backbone.")
        return code
    classes = {cls.__name__ for cls in type(pipeline).__mro__}
    found = [code for code in families.values() if classes & set(code.pipelines)]
    if len(found) != 1:
        known = ", ".join(sorted({name for code in families.values() for name in code.pipelines}))
        both = " and ".join(code.name for code in found)
        problem = f"is taken by the families {both}; choose one (family=...)" if found else "is no pipeline known here"
        raise ConfigError(f"a {type(pipeline).__name__} {problem}. backbone_from takes: {known}.")
    return found[0]


def load_reward(
    name: str | RewardRecord | Reward,
    *,
    family: str | None = None,
    dtype: DTypeLike | None = None,
    device: Device | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Reward:
    """A reward by registered name, record, local folder or hub id, as :func:`load_backbone`; whole and in float32."""
    from .reward import Reward

    if isinstance(name, Reward):
        return name
    record = name if isinstance(name, RewardRecord) else _reward_record(name, family)
    cls: RewardFamily = family_class(record)
    precision = None if dtype is None else as_dtype(dtype)
    network = cls.from_pretrained(
        record, dtype=precision, device=_placed(device), token=token, local_files_only=local_files_only
    )
    return _adopted(network, record)


def _placed(device: Device | None) -> Device:
    from .devices import default_device

    return default_device() if device is None else device


def build_geometry(record: BackboneRecord | RewardRecord) -> Any:
    """The full-size network on the meta device: shapes and names, no memory, no weights, no network access."""
    return _build(record, record.architecture, "architecture", "meta")


def build_twin(record: BackboneRecord | RewardRecord) -> Any:
    """The record's small twin: the real upstream classes with the same random weights every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(record, record.twin, "twin", "cpu")


def _build(record: BackboneRecord | RewardRecord, table: Mapping[str, Any], key: str, device: str) -> Any:
    if not table:
        raise ConfigError(f"{record.name!r} has no '{key}' in its record, so it cannot be built without weights.")
    return _adopted(family_class(record).build(table, device=device), record)


def _adopted(network: Any, record: BackboneRecord | RewardRecord) -> Any:
    """The network with its record; :class:`ConfigError` where a reward compares with something else than that says."""
    declared = getattr(record, "condition", None)
    if declared is not None and declared != network.condition_kind:
        raise ConfigError(
            f"the record of {record.name!r} says that it compares with {declared}, but its family {record.family!r} "
            f"compares with {network.condition_kind}; correct 'condition' or 'family'."
        )
    network.record = record
    return network


def load_aligner(name: str | AlignerRecord) -> type[Any]:
    """The class of an alignment method; its attrs fields are the method's settings."""
    record = registry().aligner(name) if isinstance(name, str) else name
    _check_installed(record, record.name)
    return _resolve(record.load, record.name)


def load_dataset_plugin(name: str | DatasetRecord) -> type[Any]:
    """The class of an image source that a package offers by name."""
    record = registry().dataset(name) if isinstance(name, str) else name
    return _resolve(record.load, record.name)


def as_dtype(dtype: DTypeLike) -> torch.dtype:
    """A torch dtype from its name; :class:`ConfigError` for anything but a floating-point one."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"unknown dtype {dtype!r}; choose float32, float16 or bfloat16.")
    return found


def missing_modules(record: Family | AlignerRecord) -> tuple[str, ...]:
    """Which of a record's ``requires`` are not installed; nothing is imported to find out."""
    return tuple(module for module in record.requires if importlib.util.find_spec(module.partition(".")[0]) is None)


def _backbone_record(name: str, family: str | None) -> BackboneRecord:
    place = _place(name, family, registry().backbone_families)
    return registry().backbone(name) if place is None else BackboneRecord(**place)


def _reward_record(name: str, family: str | None) -> RewardRecord:
    place = _place(name, family, registry().reward_families)
    return registry().reward(name) if place is None else RewardRecord(**place)


def _place(name: str, family: str | None, families: Mapping[str, Family]) -> dict[str, Any] | None:
    """A record's fields for a name that is a folder or a hub id, None for a registered name."""
    if name.startswith(HUB):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        place = {"repo": repo, "revision": revision or None}
        label = repo.rpartition("/")[2]
    elif name.startswith(FOLDER) or "/" in name or (family is not None and Path(name).is_dir()):
        folder = Path(name.removeprefix(FOLDER)).expanduser().absolute()
        if not folder.is_dir():
            raise WeightsError(f"{str(folder)!r} is not a folder; give a registered name, a folder or '{HUB}org/repo'.")
        place, label = {"path": str(folder)}, folder.name
    else:
        return None
    if family is None:
        raise ConfigError(f"{name!r} needs a family to say how to read it; choose one of: {', '.join(families)}.")
    label = "".join(c if c.isalnum() or c in "._-" else "-" for c in label.lower()).lstrip("._-") or "unnamed"
    return {"name": label, "family": families[family].name, **place}


def family_class(record: BackboneRecord | RewardRecord) -> Any:
    """The class behind a record; ``PluginLoadError`` where it cannot be imported."""
    family = registry().family(record)
    _check_installed(family, record.name)
    return _resolve(family.load, family.name)


def _check_installed(record: Family | AlignerRecord, wanted: str) -> None:
    missing = missing_modules(record)
    if missing:
        way_out = f"pip install '{record.install}'" if record.install else f"pip install {' '.join(missing)}"
        raise PluginLoadError(f"{wanted!r} needs {', '.join(missing)}, which is not installed: {way_out}.")


def _resolve(load: str, name: str) -> Any:
    """The object that a ``load`` string names."""
    module_name, _, attribute = load.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginLoadError(f"{name!r}: cannot load {load!r}: {type(error).__name__}: {error}.") from error
