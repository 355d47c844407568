"""The row of each table that an iteration reads, copied by one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

BLOCK = 256


@triton.jit
def _copy(table, row, at, COUNT, BLOCK: tl.constexpr):
    for start in range(0, COUNT, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(table + at * COUNT + place, mask=place < COUNT, other=0)
        tl.store(row + place, values, mask=place < COUNT)


@triton.jit
def _rows_at(
    shift,  # int64 [T, SHIFTS]
    flip,  # uint8 [T, FLIPS]
    lr,  # float64 [T]
    iteration,  # int64 [1]
    shift_row,  # int64 [SHIFTS]
    flip_row,  # uint8 [FLIPS]
    lr_row,  # float64 [1]
    SHIFTS,
    FLIPS,
    BLOCK: tl.constexpr,
):
    at = tl.load(iteration)
    _copy(shift, shift_row, at, SHIFTS, BLOCK)
    _copy(flip, flip_row, at, FLIPS, BLOCK)
    one = tl.arange(0, 1)
    tl.store(lr_row + one, tl.load(lr + at + one))


def rows_at(
    shift: Tensor, flip: Tensor, lr: Tensor, iteration: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`smi_fast.engine.iteration_reference.rows_at`."""
    tables = shift.contiguous(), flip.contiguous().view(torch.uint8), lr.contiguous()
    rows = [table.new_empty(1, *table.shape[1:]) for table in tables]
    sizes = rows[0].numel(), rows[1].numel()
    launch(_rows_at, (1,), shift, *tables, iteration, *rows, *sizes, BLOCK=BLOCK, num_warps=4)
    return rows[0], rows[1].view(torch.bool), rows[2]
