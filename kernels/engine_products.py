"""Matrix products with the step that follows them, in one kernel.

Products of float32 are exact but for rounding, or TF32 where torch's own products on CUDA are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .engine_steps import gelu_constants, gelu_with_derivative, tile

# Large tiles read less from memory, but only enough of them keep every multiprocessor busy.
LARGE, SMALL = 128, 64
ENOUGH_TILES = 128
# Bytes that a tile has along the inner dimension: a whole line of memory.
INNER_BYTES = 128


@triton.jit
def _product(
    a,  # [ROWS, K]
    b,  # [K, F], with these strides
    row,
    column,
    b_k,
    b_f,
    ROWS,
    K: tl.constexpr,
    F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of a @ b, in float32."""
    inner = tl.arange(0, BLOCK_K)
    a += row[:, None] * K + inner[None, :]
    b += inner[:, None] * b_k + column[None, :] * b_f
    total = tl.zeros([BLOCK_ROWS, BLOCK_F], tl.float32)
    for start in range(0, K, BLOCK_K):
        real = inner < K - start
        left = tl.load(a + start, mask=(row < ROWS)[:, None] & real[None, :], other=0.0)
        right = tl.load(b + start * b_k, mask=real[:, None] & (column < F)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _linear_gelu(
    x,  # [ROWS, K]
    weight,  # [F, K]
    bias,  # float32 [F]
    derivative,  # [ROWS, F]
    out,  # [ROWS, F]
    ROWS,
    K: tl.constexpr,
    F: tl.constexpr,
    SLOPE: tl.constexpr,
    CUBIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, column, at, exists = tile(ROWS, F, BLOCK_ROWS, BLOCK_F)
    y = _product(x, weight, row, column, 1, K, ROWS, K, F, BLOCK_ROWS, BLOCK_F, BLOCK_K, PRECISION)
    y += tl.load(bias + column, mask=column < F, other=0.0)[None, :]
    value, slope = gelu_with_derivative(y, SLOPE, CUBIC)
    tl.store(out + at, value, mask=exists)
    tl.store(derivative + at, slope, mask=exists)


@triton.jit
def _multiplied_product(
    grad,  # [ROWS, K]
    weight,  # [K, F], with these strides
    factors,  # [ROWS, F]
    out,  # [ROWS, F]
    stride_k,
    stride_f,
    ROWS,
    K: tl.constexpr,
    F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, column, at, exists = tile(ROWS, F, BLOCK_ROWS, BLOCK_F)
    product = _product(
        grad,
        weight,
        row,
        column,
        stride_k,
        stride_f,
        ROWS,
        K,
        F,
        BLOCK_ROWS,
        BLOCK_F,
        BLOCK_K,
        PRECISION,
    )
    product *= tl.load(factors + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + at, product, mask=exists)


def _tiles(a: Tensor, columns: int, side: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the constants of a product of a [rows, K] with this many columns, in tiles of a
    side that is LARGE or SMALL, or for 0 chosen by these sizes.
    """
    rows, inner = a.shape
    side = side or (LARGE if rows * columns >= ENOUGH_TILES * LARGE**2 else SMALL)
    constants = {
        "K": inner,
        "F": columns,
        "BLOCK_ROWS": side,
        "BLOCK_F": side,
        "BLOCK_K": INNER_BYTES // a.element_size(),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": 8 if side == LARGE else 4,
        "num_stages": 3,
    }
    return (triton.cdiv(rows, side), triton.cdiv(columns, side)), constants


def linear_gelu_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    derivative: Tensor,
    out: Tensor,
    approximate: str = "none",
    side: int = 0,
) -> None:
    """See :func:`smi_fast.engine.reference.linear_gelu_`."""
    grid, constants = _tiles(x, len(weight), side)
    tensors = x, weight, bias, derivative, out
    launch(_linear_gelu, grid, x, *tensors, len(x), **gelu_constants(approximate), **constants)


def multiplied_product_(
    grad: Tensor, weight: Tensor, factors: Tensor, out: Tensor, side: int = 0
) -> None:
    """See :func:`smi_fast.engine.reference.multiplied_product_`; weight may have any strides.

    Tensor cores of sm_90 take TF32 only along the inner dimension: there weight should be the
    transpose of a contiguous tensor.
    """
    grid, constants = _tiles(grad, weight.shape[1], side)
    tensors, sizes = (grad, weight, factors, out), (*weight.stride(), len(grad))
    launch(_multiplied_product, grid, grad, *tensors, *sizes, **constants)
