"""Whole jittered images, for networks that look at every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def jitter_images(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Images as the dense loop jitters them, without reading ``shift`` or ``flip`` on the host.

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
    """Rows and columns in another order; its gradient is their inverse order, not a scatter."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return images.index_select(2, rows).index_select(3, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = (order.argsort() for order in ctx.saved_tensors)
        return grad.index_select(2, rows).index_select(3, columns), None, None
