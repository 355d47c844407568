"""Jitter: a shift and a mirroring of all images, drawn anew in each iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Side of the image over the largest shift, as published (arXiv 2510.27186).
JITTER_SHARE = 8


def random_jitter(
    iterations: int, image_size: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the jitter of a run.

    Args:
        iterations: T.
        image_size: (height, width) in pixels; a shift is at most an eighth of each.
        generator: on the CPU; None for torch's own.

    Returns:
        shift int64 [T, 2] in pixels (rows, columns), and flip bool [T].
    """
    limits = [side // JITTER_SHARE for side in image_size]
    shift = torch.stack(
        [torch.randint(-m, m + 1, (iterations,), generator=generator) for m in limits], dim=1
    )
    # The data type is named, so that the default one doesn't change what a seed draws.
    flip = torch.rand(iterations, generator=generator, dtype=torch.float32) < 0.5
    return shift, flip


def jitter_images(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Jitter whole images, as the dense loop does, without a read by the host.

    Equal to::

        jittered = images.roll((shift[0], shift[1]), (2, 3))
        jittered = jittered.flip(3) if flip else jittered

    Args:
        images: [B, C, H, W].
        shift: int64 [2], pixels (rows, columns) that all images are rolled by.
        flip: bool [], whether all images are mirrored left to right afterwards.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - shift[0]) % height
    columns = (torch.arange(width, device=images.device) - shift[1]) % width
    columns = torch.where(flip, columns.flip(0), columns)
    jittered: Tensor = _Permute.apply(images, rows, columns)
    return jittered


class _Permute(torch.autograd.Function):
    """Reorders rows and columns. Its gradient reorders them back, which needs no scatter."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return images.index_select(2, rows).index_select(3, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = (order.argsort() for order in ctx.saved_tensors)
        return grad.index_select(2, rows).index_select(3, columns), None, None
