"""A LoRA over a backbone: one that is to be trained, one that was, and whether there is one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from .backbone import Backbone
from .errors import ConfigError, PluginLoadError, WeightsError
from .files import read_tensors
from .records import name_of
from .structuring import with_config_errors
from .validators import whole_from

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What ``pipe.load_lora_weights`` of diffusers looks for in a folder."""


def _names(instance: object, attribute: attrs.Attribute[Any], targets: object) -> None:
    if isinstance(targets, str):
        raise ConfigError(f"targets is {targets!r}; give a list of names.")
    if targets == ():
        raise ConfigError("targets is empty; give a list of names, or null for the family's own.")


@attrs.frozen(field_transformer=with_config_errors)
class LoraSettings:
    """Low-rank adaptation; the defaults are the paper's (section 6).

    ``rank`` and ``alpha`` (an update is scaled by ``alpha / rank``); ``targets``, the ends of the names of the modules
    that are adapted: None for the family's own, attention's projections.
    """

    rank: int = attrs.field(default=32, validator=whole_from(1))
    alpha: int = attrs.field(default=64, validator=whole_from(1))
    targets: tuple[str, ...] | None = attrs.field(default=None, validator=_names)


def with_lora(backbone: Backbone, lora: str | Path) -> Backbone:
    """The backbone with a LoRA over it, as :func:`~stitchvm.core.train` or diffusers saves one: a folder or its
    ``.safetensors`` file. The one that is given stays as it is, and both share its tensors.

    Raises ``WeightsError`` where there is none or where it adapts anything else than this network,
    :class:`ConfigError` for a network that has one already, ``PluginLoadError`` without peft.
    """
    check_bare(backbone)
    path = Path(lora).expanduser()
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{str(lora)!r} holds no LoRA; give a folder with {LORA_FILE}, or such a file.")
    twin, there = backbone.sharing(), {name for name, _ in backbone.net.named_modules()}
    adapted = {name.partition(".lora_")[0] for name in read_tensors(file)}
    # diffusers would leave out, with a warning, what finds no module
    if foreign := sorted(adapted - {f"{twin.component}.{name}" for name in there}):
        raise WeightsError(
            f"{str(lora)!r} adapts {foreign[0]}, which {name_of(backbone)} does not have. Give a LoRA of its "
            f"{twin.component} alone, in the format of diffusers."
        )
    net: Any = twin.net
    try:
        net.load_lora_adapter(
            str(file.parent), prefix=twin.component, weight_name=file.name, use_safetensors=True, adapter_name=ADAPTER
        )
    except ImportError as error:
        raise PluginLoadError("a LoRA needs peft: pip install 'stitchvm[train]'.") from error
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{str(lora)!r} does not fit {name_of(backbone)}: {error}") from error
    net.requires_grad_(False)
    return twin


def adapters_of(net: nn.Module) -> frozenset[str]:
    """The names of peft's adapters in a network, whether or not they are switched on."""
    held = (getattr(module, "lora_A", None) for module in net.modules())
    return frozenset(name for one in held if isinstance(one, nn.ModuleDict) for name in one)


def check_bare(backbone: Backbone) -> None:
    """:class:`ConfigError` for a backbone that has a LoRA."""
    if found := adapters_of(backbone.net):
        raise ConfigError(
            f"{name_of(backbone)} has a LoRA already ({', '.join(sorted(found))}), and a second one would switch it "
            "off. Make it part of the weights (pipe.fuse_lora(), then pipe.unload_lora_weights()), or take it out."
        )


def inject(backbone: Backbone, lora: LoraSettings, seed: int) -> None:
    """Put adapters into the modules of ``backbone.net``, in place.

    Raises :class:`ConfigError` for a target that it has none of or that cannot be adapted, ``PluginLoadError`` without
    peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise PluginLoadError("training with a LoRA needs peft: pip install 'stitchvm[train]'.") from error
    targets = list(lora.targets or backbone.lora_targets)
    if lora.targets is not None:  # of the family's own, a network need not have all
        _check_targets(backbone, targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=targets)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, backbone.net, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(
            f"{type(backbone).__name__} has none of the modules {', '.join(targets)} that a LoRA can adapt: {error}"
        ) from error
    for parameter in backbone.net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _check_targets(backbone: Backbone, targets: list[str]) -> None:
    """peft passes over a target that it does not find, as long as it finds another."""
    paths = [f".{name}" for name, _ in backbone.net.named_modules()]
    missing = [target for target in targets if not any(path.endswith(f".{target}") for path in paths)]
    if not missing:
        return
    known = sorted({path.rpartition(".")[2] for path in paths} | set(backbone.lora_targets))
    close = [match for target in missing for match in difflib.get_close_matches(target, known, 1)]
    hint = f"; did you mean {', '.join(close)}?" if close else "."
    raise ConfigError(
        f"{name_of(backbone)} has none of the modules {', '.join(missing)} that targets names{hint} "
        f"Its family's own are {', '.join(backbone.lora_targets)}."
    )
