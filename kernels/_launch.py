"""Start a Triton kernel on the right device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Start a kernel on the device of a tensor; with an empty grid it does nothing.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along each axis.
        like: the kernel runs on the current stream of this tensor's device.
        arguments: the kernel's arguments, in order.
        constants: its constexprs, and launch options such as ``num_warps``.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **constants)
