"""What moves a value model's branches in stage 2: AdamW, or Muon for weight matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..branch import Branch
from ..checkpoints import load_optimiser, optimiser_tensors
from ..errors import ConfigError
from ..value import StitchedValue
from .finetune_settings import FinetuneSettings


@attrs.frozen(eq=False)
class Optimisers:
    """Torch's optimisers by name, stepped together; each group's ``base`` is its learning rate before the schedule."""

    named: Mapping[str, torch.optim.Optimizer]

    @classmethod
    def of(cls, value: StitchedValue, settings: FinetuneSettings) -> Self:
        """For the layers and the trained part of the tails. Raises :class:`ConfigError` where torch has no Muon."""
        branches = [branch for branch in value.branches if isinstance(branch, Branch)]
        layers = [p for branch in branches for p in branch.layer.parameters()]
        tails = [p for branch in branches for p in branch.tail.parameters() if p.requires_grad]
        rate, decay = settings.learning_rate, settings.weight_decay
        # the weights of the tower's own maps: a tail's prefix tokens are two-dimensional too, but no map
        matrices = [
            p for branch in branches for p in branch.tail.part.parameters()
            if settings.optimiser == "muon" and p.ndim == 2 and p.requires_grad
        ]  # fmt: skip
        apart = {id(p) for p in matrices}
        groups = [
            {"params": layers, "base": rate * settings.layer_multiplier},
            {"params": [p for p in tails if id(p) not in apart], "base": rate},
        ]
        fused = value.device.type in ("cuda", "cpu")
        named: dict[str, Any] = {"optimiser": torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=fused)}
        if matrices:
            named["muon"] = _muon([{"params": matrices, "base": rate * settings.matrix_multiplier}], rate, decay)
        return cls(named)

    def scale_rates(self, factor: float) -> None:
        """Every learning rate is ``factor`` times its base."""
        for optimiser in self.named.values():
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * factor

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """The gradients as they are without the scale that fp16 needs."""
        for optimiser in self.named.values():
            scaler.unscale_(optimiser)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Move all parameters and forget their gradients."""
        for optimiser in self.named.values():
            with _WithoutBfloat16() if _on_cpu(optimiser) else nullcontext():
                scaler.step(optimiser)
        scaler.update()
        for optimiser in self.named.values():
            optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Their state, for a checkpoint."""
        return {key: t for name, each in self.named.items() for key, t in optimiser_tensors(each, name).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`tensors` gave."""
        for name, optimiser in self.named.items():
            load_optimiser(optimiser, tensors, name)


class _WithoutBfloat16(TorchFunctionMode):
    """What is cast to bfloat16 here stays as it is: torch's Muon iterates in it, at which a CPU without units for it is
    many times slower than at float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0].clone() if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


def _on_cpu(optimiser: torch.optim.Optimizer) -> bool:
    return all(p.device.type == "cpu" for group in optimiser.param_groups for p in group["params"])


def _muon(groups: list[dict[str, Any]], rate: float, decay: float) -> torch.optim.Optimizer:
    make = getattr(torch.optim, "Muon", None)
    if make is None:
        raise ConfigError(
            f"the recipe's optimiser is 'muon', which torch {torch.__version__} lacks; install torch 2.9 or newer, "
            "or set optimiser to 'adamw'."
        )
    # updates as large as AdamW's, so that one learning rate means the same to both
    made: torch.optim.Optimizer = make(groups, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return made
