"""Gradients of pixels that are collected first, and then computed by one kernel.

An iteration reads the pixels twice: their patches are gathered, and their variation is measured.
Autograd would write the gradient of each into a whole image, and add the two. Here the ops leave
what their gradients are computed from, and one kernel writes the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smi_fast.ops import backends

# The backend that has a kernel for both.
BACKEND = "triton"


class Windows(NamedTuple):
    """What the gradient of :func:`smi_fast.ops.gather_patches` is computed from.

    Attributes:
        grad: [B, K, C·P·P].
        kept: int64 [B, K].
        shift: int64 [B, 2].
        flip: bool [B].
        patch_size: P.
    """

    grad: Tensor
    kept: Tensor
    shift: Tensor
    flip: Tensor
    patch_size: int


class Variation(NamedTuple):
    """What the gradient of :func:`smi_fast.ops.total_variation` is computed from.

    Attributes:
        grad_l1: scalar.
        grad_l2: scalar.
        active: int64 [B, K].
        patch_size: P.
        sums: [3, 4].
    """

    grad_l1: Tensor
    grad_l2: Tensor
    active: Tensor
    patch_size: int
    sums: Tensor


class Collected:
    """What the gradient of one tensor of images is computed from.

    Args:
        images: [B, C, H, W]; only ops that are called with this very tensor take part.
    """

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._windows: Windows | None = None
        self._variation: Variation | None = None
        self._open = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within it the ops leave their parts; a gradient that is asked for elsewhere is whole."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def take(self, part: Windows | Variation) -> bool:
        """Whether it takes a part, instead of its gradient. It takes one of each kind."""
        if not self._open:
            return False
        if isinstance(part, Windows):
            if self._windows is not None:
                return False
            self._windows = part
        else:
            if self._variation is not None:
                return False
            self._variation = part
        return True

    def gradient(self, rest: Tensor | None) -> Tensor | None:
        """The gradient of the images [B, C, H, W]: of the parts, and the rest that autograd found;
        None where there is neither.
        """
        found = [tensor for tensor in (*self._of_parts(), rest) if tensor is not None]
        return sum(found[1:], found[0]) if found else None

    def _of_parts(self) -> Iterator[Tensor]:
        windows, variation, images = self._windows, self._variation, self._images.detach()
        functions = backends.by_name(BACKEND).functions
        if (
            windows is not None
            and variation is not None
            and _are_same(windows.kept, variation.active)
        ):
            norms, size = (variation.grad_l1, variation.grad_l2), windows.patch_size
            yield functions.pixel_gradient(*windows[:4], *norms, images, size, variation.sums)
            return
        if windows is not None:
            yield functions.gather_patches_backward(*windows, *images.shape[2:])
        if variation is not None:
            l1, l2, active, size, sums = variation
            yield functions.total_variation_backward(l1, l2, images, active, size, sums)


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one memory, read in the same way."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


_current: ContextVar[Collected | None] = ContextVar("collected", default=None)


@contextmanager
def collected(images: Tensor) -> Iterator[Collected]:
    """Ops that are called within it, with these images, can leave parts of their gradient."""
    found = Collected(images)
    if torch.compiler.is_compiling():  # a compiler fuses by itself, and traces no such variable
        yield found
        return
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def collector_of(images: Tensor, backend: Any) -> Collected | None:
    """What collects the parts of these images' gradient, for an op of this backend, or None."""
    if torch.compiler.is_compiling() or backend.name != BACKEND:
        return None
    found = _current.get()
    return found if found is not None and found._images is images else None
