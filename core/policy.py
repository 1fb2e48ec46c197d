"""A backbone in training: numbers of its own over the tensors of the frozen one, which stays as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .backbone import Backbone
from .errors import ArtefactError, ConfigError, PluginLoadError, WeightsError
from .files import make_folder, read_tensors, write_tensors
from .loading import name_of
from .sharding import own_share, shard, shared_like, whole

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What ``pipe.load_lora_weights`` of diffusers looks for in a folder."""


@attrs.frozen
class LoraSettings:
    """Low-rank adaptation; the defaults are the paper's (section 6).

    ``rank`` and ``alpha`` (an update is scaled by ``alpha / rank``); ``targets``, the ends of the names of the modules
    that are adapted: None for the family's own, attention's projections.
    """

    rank: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    alpha: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    targets: tuple[str, ...] | None = None


@attrs.frozen(eq=False)
class Policy:
    """A backbone whose ``parameters`` (by name in ``backbone.net``, float32) are trained; all else is shared, frozen.

    ``frozen`` is the backbone that it began as. ``lora`` None: the whole network is trained, on a copy, which processes
    that form a ``mesh`` share out among them.
    """

    frozen: Backbone
    backbone: Backbone
    parameters: dict[str, nn.Parameter]
    lora: LoraSettings | None
    mesh: DeviceMesh | None = None

    @classmethod
    def of(
        cls, backbone: Backbone, lora: LoraSettings | None, seed: int = 0, mesh: DeviceMesh | None = None
    ) -> Self:
        """A policy that begins as ``backbone``: a LoRA's second factor is 0, its first one drawn from ``seed``.

        Raises :class:`ConfigError` for targets that the network has none of and for a LoRA on a mesh,
        ``PluginLoadError`` without peft.
        """
        if mesh is not None and lora is not None:
            raise ConfigError(
                "a LoRA is too small to be sharded: each process holds the frozen network once, whatever it trains. "
                "Set shard to false, or lora to null to train the whole network."
            )
        twin = backbone.sharing()
        if lora is None:
            twin.net = copy.deepcopy(backbone.net).float().requires_grad_(True)
        else:
            _inject(twin, lora, seed)
        if mesh is not None:
            shard(twin, mesh)
        trained = {name: p for name, p in twin.net.named_parameters() if p.requires_grad}
        return cls(backbone, twin, trained, lora, mesh)

    def another(self) -> Policy:
        """A policy of the same numbers with tensors of its own to hold others, not trained."""
        if self.mesh is not None:
            other = type(self).of(self.frozen, self.lora, mesh=self.mesh)
            other.follow(self, 0.0)
            other.backbone.net.requires_grad_(False)
            return other
        trained = {id(p) for p in self.parameters.values()}
        twin = copy.copy(self.backbone)
        twin = twin.with_tensors(lambda t: nn.Parameter(t.detach().clone(), False) if id(t) in trained else t)
        names = dict(twin.net.named_parameters())
        return Policy(self.frozen, twin, {name: names[name] for name in self.parameters}, self.lora)

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the trained numbers, whole; processes of a mesh must ask together."""
        return {name: whole(p.detach()).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take numbers that :meth:`tensors` gave; :class:`ArtefactError` for those of another policy."""
        if set(tensors) != set(self.parameters) or any(
            tensors[name].shape != p.shape for name, p in self.parameters.items()
        ):
            raise ArtefactError("these weights belong to another network or LoRA; check rank and targets.")
        for name, parameter in self.parameters.items():
            parameter.copy_(shared_like(tensors[name], parameter))

    @torch.no_grad()
    def follow(self, other: Policy, decay: float) -> None:
        """``decay`` times its own numbers plus the rest of the other's."""
        for name, parameter in self.parameters.items():
            own_share(parameter).lerp_(own_share(other.parameters[name].detach()), 1 - decay)

    def save(self, folder: str | Path, write: bool = True) -> Path:
        """Write what plain diffusers loads: ``pipe.load_lora_weights(folder)`` for a LoRA, the network's own folder
        (``transformer/`` or ``unet/``) otherwise. Returns the folder.

        Processes of a mesh must call it together, all but one without ``write``. Raises ``OutputError`` where writing
        is impossible.
        """
        component = self.backbone.component
        net: Any = self._gathered() if self.mesh is not None else self.backbone.net
        if not write:
            return Path(folder)
        folder = make_folder(folder)
        if self.lora is None:
            net.save_pretrained(folder / component)
            return folder
        from peft import get_peft_model_state_dict

        tensors = {f"{component}.{n}": t for n, t in get_peft_model_state_dict(net, adapter_name=ADAPTER).items()}
        config = {f"{component}.{key}": entry for key, entry in net.peft_config[ADAPTER].to_dict().items()}
        text = json.dumps(config, default=sorted, sort_keys=True)
        write_tensors(folder / LORA_FILE, tensors, {"format": "pt", "lora_adapter_metadata": text})
        return folder

    def _gathered(self) -> nn.Module:
        """The whole network in one process, as long as its caller keeps it."""
        net = copy.deepcopy(self.frozen.net).float()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(whole(self.parameters[name].detach()))
        return net


def with_lora(backbone: Backbone, lora: str | Path) -> Backbone:
    """The backbone with a LoRA over it, as :func:`~stitchvm.core.train` or diffusers saves one: a folder or its
    ``.safetensors`` file. The one that is given stays as it is, and both share its tensors.

    Raises ``WeightsError`` where there is none or where it adapts anything else than this network, ``PluginLoadError``
    without peft.
    """
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


def _inject(backbone: Backbone, lora: LoraSettings, seed: int) -> None:
    """Put adapters into the modules of ``backbone.net``, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise PluginLoadError("training with a LoRA needs peft: pip install 'stitchvm[train]'.") from error
    targets = list(lora.targets or backbone.lora_targets)
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
