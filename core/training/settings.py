"""What every method's training is made of."""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import attrs
from accelerate.utils import parse_flag_from_env

from ..errors import ConfigError
from ..lora import LoraSettings
from ..structuring import with_config_errors
from ..validators import whole_from

positive: Any = attrs.validators.and_(attrs.validators.gt(0), attrs.validators.lt(math.inf))
optional_positive: Any = attrs.validators.optional(positive)
optional_text: Any = attrs.validators.optional(attrs.validators.instance_of(str))
non_negative: Any = [attrs.validators.ge(0), attrs.validators.lt(math.inf)]


PRECISIONS = ("no", "bf16")


def _precision(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and value not in PRECISIONS:
        raise ConfigError(f"mixed_precision is {value!r}; give no or bf16, or null for what the launcher says.")


@attrs.frozen(field_transformer=with_config_errors)
class TrainSettings:
    """What every method's training is made of, beside the method's own settings.

    ``updates``: in all. ``prompts_per_update``: over all processes, which share them equally. ``inner_updates``:
    optimiser steps on one collection. ``learning_rate``, ``weight_decay``, ``clip_norm``: of AdamW (the paper's DRaFT:
    5e-5, 0, 1; DiffusionNFT as released: 3e-4, 1e-4, 1; ``clip_norm`` None: no clipping). ``ema_decay``: of the
    averaged weights that are evaluated and saved, at most ``(1 + k) / (10 + k)`` at update ``k``; 0 takes the last
    ones. ``lora``: None trains the whole network. ``batch``: samples of one network pass; it changes nothing else.
    ``gradient_checkpointing``: run blocks again on the way back, for memory; a run that ran out of it goes on so.
    ``mixed_precision``: what the passes of an update run in, ``no`` (as the networks are) or ``bf16``; None: what
    ``accelerate launch --mixed_precision`` or its configuration says, ``no`` without a launcher.
    ``evaluate_every`` and ``checkpoint_every`` count updates. ``shard``: share the trained network, its averages, its
    old policy and the optimiser's moments out over the processes (``lora`` None alone; None: where ``accelerate launch
    --use_fsdp`` says so); it changes nothing else. ``tracker``: any that Accelerate knows (``tensorboard``, ``wandb``
    ..; its files go to ``OUT/stitchvm``), None for none. ``head``: whose blocks a stitched value reads, those of the
    ``frozen`` backbone, which it was stitched to, or the ``policy``'s, through which its gradient then passes as well.

    Raises ``ConfigError`` for a value out of range.
    """

    updates: int = attrs.field(default=100, validator=whole_from(1))
    prompts_per_update: int = attrs.field(default=8, validator=whole_from(1))
    inner_updates: int = attrs.field(default=1, validator=whole_from(1))
    learning_rate: float = attrs.field(default=3e-4, validator=positive)
    weight_decay: float = attrs.field(default=1e-4, validator=non_negative)
    clip_norm: float | None = attrs.field(default=1.0, validator=optional_positive)
    ema_decay: float = attrs.field(default=0.9, validator=[attrs.validators.ge(0), attrs.validators.lt(1)])
    lora: LoraSettings | None = attrs.field(
        factory=LoraSettings, validator=attrs.validators.optional(attrs.validators.instance_of(LoraSettings))
    )
    batch: int = attrs.field(default=8, validator=whole_from(1))
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] | None = attrs.field(default=None, validator=_precision)
    evaluate_every: int = attrs.field(default=10, validator=whole_from(1))
    checkpoint_every: int = attrs.field(default=10, validator=whole_from(1))
    shard: bool | None = None
    tracker: str | None = attrs.field(default="tensorboard", validator=optional_text)
    head: Literal["frozen", "policy"] = attrs.field(
        default="frozen", validator=attrs.validators.in_(("frozen", "policy"))
    )


def as_launched(plan: TrainSettings) -> TrainSettings:
    """The settings with what is left to the launcher (``mixed_precision`` and ``shard``) as this process was started.

    Raises :class:`ConfigError` for a launcher's precision that a training cannot run in (``fp16``, ``fp8``).
    """
    # read here and not off the Accelerator: that of a process's first job would hold for all later ones
    precision: Any = plan.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    if precision not in PRECISIONS:
        raise ConfigError(
            f"accelerate launches with mixed_precision {precision!r}, which a training cannot run in: its gradients "
            "are not scaled. Launch with --mixed_precision bf16, or set the training's own to no or bf16."
        )
    shard = parse_flag_from_env("ACCELERATE_USE_FSDP") if plan.shard is None else plan.shard
    return attrs.evolve(plan, mixed_precision=precision, shard=shard)
