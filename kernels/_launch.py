"""The one place from which kernels start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Starts a kernel on the current stream of the device of a tensor; an empty grid is no work."""
    if 0 in grid:
        return
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **constants)
