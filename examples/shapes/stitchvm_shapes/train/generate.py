"""Pictures from the exported pipelines, as any user of diffusers makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..render import SIZE


@torch.no_grad()
def generate(
    pipe: Any, captions: list[str], guidance: float, steps: int, seed: int = 0, batch: int = 50, **settings: Any
) -> Tensor:
    """One picture per caption, float [N, 3, 64, 64] in 0 .. 1; `settings` are the pipeline's own."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(captions), batch):
        output = pipe(
            captions[start : start + batch],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
            **settings,
        )
        parts.append(output.images)
    return torch.cat(parts).clamp(0, 1)
