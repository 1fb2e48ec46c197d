"""A backbone in training: numbers of its own over the tensors of the frozen one, which stays as it is."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..backbone import Backbone
from ..errors import ArtefactError, ConfigError
from ..files import make_folder, output_errors, write_tensors
from ..lora import ADAPTER, LORA_FILE, LoraSettings, check_bare, inject
from ..sharding import own_share, shard, shared_like, whole


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
    def of(cls, backbone: Backbone, lora: LoraSettings | None, seed: int = 0, mesh: DeviceMesh | None = None) -> Self:
        """A policy that begins as ``backbone``: a LoRA's second factor is 0, its first one drawn from ``seed``.

        Raises :class:`ConfigError` for targets that the network has none of, for a LoRA on a mesh and for a network
        that has one already, ``PluginLoadError`` without peft.
        """
        check_bare(backbone)
        if mesh is not None and lora is not None:
            raise ConfigError(
                "a LoRA is too small to be sharded: each process holds the frozen network once, whatever it trains. "
                "Set shard to false, or lora to null to train the whole network."
            )
        twin = backbone.sharing()
        if lora is None:
            twin.net = copy.deepcopy(backbone.net).float().requires_grad_(True)
        else:
            inject(twin, lora, seed)
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
            partial = folder / f"{component}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with output_errors(partial):
                net.save_pretrained(partial)
                shutil.rmtree(folder / component, ignore_errors=True)
                partial.rename(folder / component)
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
