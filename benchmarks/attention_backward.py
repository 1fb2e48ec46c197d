"""Attention's backward pass in bfloat16 on a CPU: torch's own against the products that a value's gradient takes.

    python benchmarks/attention_backward.py --threads 2

At the sizes of Stable Diffusion 3.5 Medium at 512 pixels (both streams; the image alone) and of CLIP ViT-L/14 at 336,
in the layout that networks have them in. The two are taken in turn; the ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from stitchvm.core.attention import AttentionInProducts

SIZES = {"joint, 24 heads, 1,357 tokens": (24, 1357), "image, 24 heads, 1,024": (24, 1024),
         "CLIP, 16 heads, 577": (16, 577)}  # fmt: skip
WIDTH = 64


def seconds(task: Callable[[], object]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def rounds(heads: int, tokens: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds of torch's own and of the products, one after the other, without the first round."""
    draw = torch.Generator().manual_seed(0)
    grad, *inputs = (torch.randn(1, tokens, heads, WIDTH, generator=draw).bfloat16().transpose(1, 2) for _ in range(4))
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    out = F.scaled_dot_product_attention(q, k, v)

    def back() -> object:
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    found = []
    for _ in range(repeats + 1):
        own = seconds(back)
        with AttentionInProducts():
            found.append((own, seconds(back)))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sys.stdout.write("| attention | torch's own, ms | in products, ms | ratio |\n| --- | --- | --- | --- |\n")
    for name, (heads, tokens) in SIZES.items():
        found = rounds(heads, tokens, given.repeats)
        own, products = (1e3 * statistics.median(times) for times in zip(*found, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in found)
        sys.stdout.write(f"| {name} | {own:.1f} | {products:.1f} | {ratio:.2f} |\n")


if __name__ == "__main__":
    main()
