"""Total variation of a batch of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.ops._checks import as_value_error, expect, expect_index, expect_patches
from smi_fast.ops.backends import AUTO, Backend, choose
from smi_fast.ops.collected import Collected, Variation, collector_of
from smi_fast.ops.constants import constant

NORMS = ("l1", "l2")


def total_variation(
    images: Tensor, active: Tensor | None = None, *, patch_size: int = 1, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    """Total variation of a batch over horizontal, vertical and the two diagonal neighbours.

    ``differences`` has a tensor for each of the four directions: the differences of neighbouring
    pixels of the whole batch. Equal to::

        l1 = sum(d.abs().mean() for d in differences)
        l2 = sum(torch.linalg.vector_norm(d) for d in differences)

    Source: the published code of DeepInversion (arXiv 1912.08795) and SMI (arXiv 2510.27186). With
    ``active`` a difference counts if at least one of its pixels is in an active patch: the others
    are constant while the background is frozen.

    >>> images = torch.zeros(1, 1, 4, 4).index_fill(3, torch.tensor([2, 3]), 1.0)
    >>> l1, l2 = ops.total_variation(images)
    >>> round(float(l1), 3), round(float(l2), 3)
    (1.0, 5.464)

    Args:
        images: [B, C, H, W].
        active: int64 [B, K], patches of the grid, of which one that repeats counts once; None
            counts every difference.
        patch_size: side of a patch in pixels; read only with ``active``.
        backend: see :mod:`smi_fast.ops.backends`.

    Returns:
        l1 and l2, scalars in float32, or in float64 for such images.

    Raises:
        ValueError: wrong shape, data type or device;
            with the C++ kernels also a number of ``active`` out of range.
        BackendUnavailable: the backend can't run here.
    """
    l1, l2 = _norms(images, active, patch_size, backend, NORMS)
    return l1, l2


def variation_norm(
    images: Tensor, active: Tensor | None, norm: str, *, patch_size: int, backend: str
) -> Tensor:
    """One result of :func:`total_variation`, "l1" or "l2", without the cost of the other."""
    (found,) = _norms(images, active, patch_size, backend, (norm,))
    return found


def _norms(
    images: Tensor, active: Tensor | None, patch_size: int, backend: str, wanted: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Some of :data:`NORMS`, in the order of ``wanted``."""
    expect(images.dim() == 4, "images [B, C, H, W]", images)
    if active is not None:
        expect_patches(images, patch_size)
        expect_index("active", active, images)
    chosen = choose("total_variation", images.device, images.dtype, backend)
    try:
        norms: tuple[Tensor, ...] = _TotalVariation.apply(
            images, active, patch_size, chosen, wanted, collector_of(images, chosen)
        )
    except RuntimeError as error:
        raise as_value_error(error) from None
    return norms


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        active: Tensor | None,
        patch_size: int,
        backend: Backend,
        wanted: tuple[str, ...],
        collector: Collected | None,
    ) -> tuple[Tensor, ...]:
        sums = backend.functions.total_variation(images, active, patch_size)
        ctx.save_for_backward(images, active, sums)
        ctx.patch_size, ctx.backend, ctx.wanted = patch_size, backend, wanted
        ctx.collector = collector
        ctx.set_materialize_grads(False)
        absolute, norms, counts = sums
        return tuple(
            norms.sum() if norm == "l2" else (absolute / counts.clamp(min=1)).sum()
            for norm in wanted
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        images, active, sums = ctx.saved_tensors
        nothing = (None,) * 5
        if all(grad is None for grad in given):
            return None, *nothing
        grads = dict(zip(ctx.wanted, given, strict=True))
        zero = constant(0.0, sums)
        l1, l2 = (zero if grads.get(norm) is None else grads[norm] for norm in NORMS)
        if active is not None and ctx.collector is not None:
            part = Variation(l1, l2, active, ctx.patch_size, sums)
            if ctx.collector.take(part):
                return None, *nothing
        gradient = ctx.backend.functions.total_variation_backward(
            l1, l2, images, active, ctx.patch_size, sums
        )
        return gradient, *nothing
