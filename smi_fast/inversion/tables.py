"""What differs from one iteration to the next is read from rows of tables on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_fast.engine import iteration_reference
from smi_fast.ops import backends


def rows_at(
    tables: tuple[Tensor, Tensor, Tensor], iteration: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of each table at an iteration int64 [1], with a first axis of 1.

    Args:
        tables: shift int64 [T, ...], flip bool [T, ...] and the learning rate float64 [T].
        iteration: in 0..T - 1.
        backend: as the ops take it; another than "auto" and "triton" leaves it to PyTorch.
    """
    kernels = backends.step_kernels("rows_at", iteration.device, torch.float32, backend)
    if kernels is not None:
        shift, flip, lr = kernels.rows_at(*tables, iteration)
        return shift, flip, lr
    return iteration_reference.rows_at(*tables, iteration)
