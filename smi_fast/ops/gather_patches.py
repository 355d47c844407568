"""Gather the kept patches of jittered images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.ops._checks import (
    as_value_error,
    expect,
    expect_index,
    expect_patches,
    jitter_of_each,
)
from smi_fast.ops.backends import AUTO, Backend, choose
from smi_fast.ops.collected import Collected, Windows, collector_of


def gather_patches(
    images: Tensor,
    kept: Tensor,
    shift: Tensor | tuple[int, int] = (0, 0),
    flip: Tensor | bool = False,
    *,
    patch_size: int,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """The kept patches of jittered images, read without jittering the images.

    The shift moves a kept patch to the nearest cell of the grid (halves round up), and the flip
    mirrors that cell. The cell shows a displaced, wrapped-around window of the original image.
    Equal to::

        jittered = images.roll((shift[0], shift[1]), (2, 3))
        jittered = jittered.flip(3) if flip else jittered
        patches = unfold(jittered, patch_size, stride=patch_size).mT
        patches = patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[2]))

    With a shift and a flip for each image, that holds for each image alone. Only ``images`` gets a
    gradient.

    >>> images, kept = torch.rand(2, 3, 64, 64), torch.tensor([[0, 9], [5, 63]])
    >>> patches, positions = ops.gather_patches(images, kept, shift=(8, 0), patch_size=8)
    >>> patches.shape, positions.tolist()
    (torch.Size([2, 2, 192]), [[8, 17], [13, 7]])

    Args:
        images: [B, C, H, W], H and W multiples of ``patch_size``.
        kept: int64 [B, K], distinct patches of the un-jittered grid, row by row from 0.
        shift: pixels (rows, columns) that images are rolled by; a tensor is int64 [2] for all
            images, or [B, 2] for each.
        flip: whether images are then mirrored left to right; a tensor is bool [] for all images, or
            [B] for each.
        patch_size: side P of a patch in pixels.
        backend: see :mod:`smi_fast.ops.backends`.

    Returns:
        patches [B, K, C·P·P], with pixels in the order of a convolution's weight; and positions
        int64 [B, K], the cell of each patch in the grid of the jittered image.

    Raises:
        ValueError: wrong shape, data type or device;
            with the C++ kernels also a number of ``kept`` out of range.
        BackendUnavailable: the backend can't run here.
    """
    expect(images.dim() == 4, "images [B, C, H, W]", images)
    expect_patches(images, patch_size)
    expect_index("kept", kept, images)
    shift, flip = jitter_of_each(images, shift, flip)
    chosen = choose("gather_patches", images.device, images.dtype, backend)
    try:
        collector = collector_of(images, chosen)
        arguments = kept, shift, flip, patch_size, chosen, collector
        patches, positions = _GatherPatches.apply(images, *arguments)
    except RuntimeError as error:
        raise as_value_error(error) from None
    return patches, positions


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        kept: Tensor,
        shift: Tensor,
        flip: Tensor,
        patch_size: int,
        backend: Backend,
        collector: Collected | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept, shift, flip)
        ctx.patch_size, ctx.side, ctx.backend = patch_size, images.shape[-2:], backend
        ctx.collector = collector
        patches, positions = backend.functions.gather_patches(images, kept, shift, flip, patch_size)
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)
        return patches, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None:
            kept, shift, flip = ctx.saved_tensors
            windows = Windows(grad, kept, shift, flip, ctx.patch_size)
            if ctx.collector is None or not ctx.collector.take(windows):
                gradient = ctx.backend.functions.gather_patches_backward(*windows, *ctx.side)
        return gradient, None, None, None, None, None, None
