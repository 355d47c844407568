"""Cross-entropy with classes, and its gradient, in one pass: a program has the logits of one image.

Classes come in tiles, so that there may be any number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

BLOCK = 1024


@triton.jit
def _cross_entropy(
    logits,  # [B, C]
    targets,  # int64 [B]
    losses,  # float32 [B]
    gradient,  # [B, C]
    share,  # of an image in the mean, 1 / B
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    logits += row * C
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, C, BLOCK):
        real = start + column < C
        x = tl.load(logits + start + column, mask=real, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    target = tl.load(targets + row)
    # A class that doesn't exist gives NaN, which a check of the loss finds.
    exists = (target >= 0) & (target < C)
    wanted = tl.load(logits + target, mask=exists, other=float("nan")).to(tl.float32)
    tl.store(losses + row + tl.arange(0, 1), tl.log(total) + (largest - wanted))
    for start in range(0, C, BLOCK):
        real = start + column < C
        x = tl.load(logits + start + column, mask=real, other=0.0).to(tl.float32)
        probability = tl.exp(x - largest) / total
        d = (probability - tl.where(start + column == target, 1.0, 0.0)) * share
        tl.store(gradient + row * C + start + column, d, mask=real)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.engine.iteration_reference.cross_entropy`."""
    batch, classes = logits.shape
    losses = logits.new_empty(batch, dtype=torch.float32)
    gradient = logits.new_empty(batch, classes)
    tensors = logits.contiguous(), targets.contiguous(), losses, gradient
    sizes = {"C": classes, "BLOCK": BLOCK, "num_warps": 4}
    launch(_cross_entropy, (batch,), logits, *tensors, 1 / max(1, batch), **sizes)
    return losses, gradient
