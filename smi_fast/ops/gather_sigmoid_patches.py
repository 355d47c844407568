"""Gather the kept patches of jittered images that are the sigmoid of a field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.ops._checks import (
    as_value_error,
    expect,
    expect_device,
    expect_index,
    expect_patches,
    jitter_of_each,
)
from smi_fast.ops.backends import AUTO, Backend, choose


def gather_sigmoid_patches(
    field: Tensor,
    kept: Tensor,
    shift: Tensor | tuple[int, int] = (0, 0),
    flip: Tensor | bool = False,
    *,
    mean: Tensor,
    std: Tensor,
    background: Tensor | None = None,
    frozen: Tensor | None = None,
    patch_size: int,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """The kept patches of jittered images whose pixels are the sigmoid of a field, normalised.

    One pass over the pixels that the patches show; the images themselves are never made. Equal to::

        images = (torch.sigmoid(field) - mean[:, None, None]) / std[:, None, None]
        if frozen is not None:
            mask = frozen.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
            images = torch.where(mask[:, None], background, images)
        patches, positions = gather_patches(images, kept, shift, flip, patch_size=patch_size)

    Only ``field`` gets a gradient, which is zero in frozen patches.

    >>> field, kept = torch.randn(2, 3, 64, 64), torch.tensor([[0, 9], [5, 63]])
    >>> space = {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.2)}
    >>> patches, positions = ops.gather_sigmoid_patches(field, kept, (8, 0), patch_size=8, **space)
    >>> patches.shape, positions.tolist()
    (torch.Size([2, 2, 192]), [[8, 17], [13, 7]])

    Args:
        field: [B, C, H, W], H and W multiples of ``patch_size``.
        kept: int64 [B, K], distinct patches of the un-jittered grid, row by row from 0.
        shift: as in :func:`smi_fast.ops.gather_patches`.
        flip: likewise.
        mean: [C], of pixels in [0, 1].
        std: [C], likewise, above 0.
        background: images [B, C, H, W] in normalised space that frozen patches show.
        frozen: bool [B, H // patch_size, W // patch_size], true at frozen patches; given together
            with ``background``. None for no frozen patch.
        patch_size: side P of a patch in pixels.
        backend: see :mod:`smi_fast.ops.backends`.

    Returns:
        patches [B, K, C·P·P] and positions int64 [B, K], see :func:`smi_fast.ops.gather_patches`.

    Raises:
        ValueError: wrong shape, data type or device, or only one of ``background`` and ``frozen``;
            with the C++ kernels also a number of ``kept`` out of range.
        BackendUnavailable: the backend can't run here.
    """
    expect(field.dim() == 4, "field [B, C, H, W]", field)
    expect_patches(field, patch_size)
    expect_index("kept", kept, field)
    for name, values in (("mean", mean), ("std", std)):
        _expect_like(name, values, (field.shape[1],), field)
    _check_background(background, frozen, field, patch_size)
    shift, flip = jitter_of_each(field, shift, flip)
    chosen = choose("gather_sigmoid_patches", field.device, field.dtype, backend)
    try:
        patches, positions = _GatherSigmoidPatches.apply(
            field, kept, shift, flip, mean, std, background, frozen, patch_size, chosen
        )
    except RuntimeError as error:
        raise as_value_error(error) from None
    return patches, positions


def _expect_like(name: str, values: Tensor, shape: tuple[int, ...], field: Tensor) -> None:
    fits = values.shape == shape and values.dtype == field.dtype
    expect(fits, f"{name} {field.dtype} {list(shape)}", values)
    expect_device(values, field)


def _check_background(
    background: Tensor | None, frozen: Tensor | None, field: Tensor, patch_size: int
) -> None:
    if background is None and frozen is None:
        return
    if background is None or frozen is None:
        missing = "background" if background is None else "frozen"
        raise ValueError(f"expected background and frozen together, got no {missing}")
    _expect_like("background", background, tuple(field.shape), field)
    batch, _, height, width = field.shape
    shape = (batch, height // patch_size, width // patch_size)
    fits = frozen.shape == shape and frozen.dtype == torch.bool
    expect(fits, f"frozen bool {list(shape)}", frozen)
    expect_device(frozen, field)


class _GatherSigmoidPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        field: Tensor,
        kept: Tensor,
        shift: Tensor,
        flip: Tensor,
        mean: Tensor,
        std: Tensor,
        background: Tensor | None,
        frozen: Tensor | None,
        patch_size: int,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(field, kept, shift, flip, std, frozen)
        ctx.patch_size, ctx.backend = patch_size, backend
        patches, positions = backend.functions.gather_sigmoid_patches(
            field, kept, shift, flip, mean, std, background, frozen, patch_size
        )
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)
        return patches, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None:
            gradient = ctx.backend.functions.gather_sigmoid_patches_backward(
                grad, *ctx.saved_tensors, ctx.patch_size
            )
        return gradient, *[None] * 9
