"""The steps of the engine between two matrix products, one kernel each.

They compute in float32. What products read and write may be half precision, and is rounded once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

# Elements of a program of four warps, 16 for each thread. Several rows share a load of the bias.
TILE = 2048
COLUMNS = 128
# Slope and cubic coefficient of v, where a sigmoid of v approximates Φ in GELU; else a slope of 0.
GELUS = {"none": (0.0, 0.0), "tanh": (1.5957691216057308, 0.044715), "sigmoid": (1.702, 0.0)}
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # 1 / √(2π)


@triton.jit
def _rows(ROWS, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The whole rows of a program: their numbers, offsets into [ROWS, D], and what exists."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    exists = (row < ROWS)[:, None] & (column < D)[None, :]
    return row, row[:, None] * D + column[None, :], exists


@triton.jit
def tile(ROWS, F: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """The rows and columns of a program's tile, offsets into [ROWS, F], and what exists."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    exists = (row < ROWS)[:, None] & (column < F)[None, :]
    return row, column, row[:, None] * F + column[None, :], exists


@triton.jit
def _add_normalize(
    x,  # [ROWS, D], in float32 and changed if there is something to add
    added,  # [ROWS, D], or None
    bias,  # float32 [D], or None
    normalized,  # [ROWS, D]
    rstd,  # float32 [ROWS]
    eps,
    ROWS,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, exists = _rows(ROWS, D, BLOCK_ROWS, BLOCK_D)
    values = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    if added is not None:
        column = tl.arange(0, BLOCK_D)
        constant = tl.load(bias + column, mask=column < D, other=0.0)
        values += tl.load(added + at, mask=exists, other=0.0).to(tl.float32) + constant[None, :]
        tl.store(x + at, values, mask=exists)
    centred = values
    if CENTRED:
        mean = tl.sum(values, 1) / D
        centred = tl.where(exists, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    # A variance that overflows would make a row of zeros, which looks like a result.
    scale = tl.where(variance < float("inf"), tl.rsqrt(variance + eps), float("nan"))
    tl.store(rstd + row, scale, mask=row < ROWS)
    tl.store(normalized + at, centred * scale[:, None], mask=exists)


@triton.jit
def _normalize_backward(
    gradient,  # float32 [ROWS, D], changed
    grad,  # [ROWS, D]
    normalized,  # [ROWS, D]
    rstd,  # float32 [ROWS]
    copy,  # [ROWS, D], or None
    ROWS,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, exists = _rows(ROWS, D, BLOCK_ROWS, BLOCK_D)
    d = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
    n = tl.load(normalized + at, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row, mask=row < ROWS, other=0.0)
    # dx = rstd (d − mean(d) − n mean(d ∘ n)), without mean(d) in RMSNorm.
    slope = tl.sum(d * n, 1) / D
    change = d - n * slope[:, None]
    if CENTRED:
        mean = tl.sum(d, 1) / D
        change -= mean[:, None]
    total = tl.load(gradient + at, mask=exists, other=0.0) + scale[:, None] * change
    tl.store(gradient + at, total, mask=exists)
    if copy is not None:
        tl.store(copy + at, total, mask=exists)


@triton.jit
def gelu_with_derivative(y, SLOPE: tl.constexpr, CUBIC: tl.constexpr):
    """gelu(y) = y Φ(y), and its derivative Φ(y) + y φ(y); or with a sigmoid in the place of Φ."""
    if SLOPE == 0.0:
        cdf = 0.5 + 0.5 * tl.erf(y * SQRT_HALF)
        density = DENSITY_AT_ZERO * tl.exp(-0.5 * y * y)
    else:
        cdf = 1.0 / (1.0 + tl.exp(-SLOPE * (y + CUBIC * y * y * y)))
        density = cdf * (1.0 - cdf) * (SLOPE * (1.0 + 3.0 * CUBIC * y * y))
    return y * cdf, cdf + y * density


@triton.jit
def _gelu(
    x,  # [ROWS, F], becomes the derivative
    bias,  # float32 [F]
    out,  # [ROWS, F]
    ROWS,
    F: tl.constexpr,
    SLOPE: tl.constexpr,
    CUBIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    _, column, at, exists = tile(ROWS, F, BLOCK_ROWS, BLOCK_F)
    constant = tl.load(bias + column, mask=column < F, other=0.0)
    y = tl.load(x + at, mask=exists, other=0.0).to(tl.float32) + constant[None, :]
    value, derivative = gelu_with_derivative(y, SLOPE, CUBIC)
    tl.store(out + at, value, mask=exists)
    tl.store(x + at, derivative, mask=exists)


@triton.jit
def _multiply(
    x,  # [ELEMENTS], changed
    factors,  # [ELEMENTS]
    ELEMENTS,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < ELEMENTS
    product = tl.load(x + at, mask=exists).to(tl.float32)
    product *= tl.load(factors + at, mask=exists).to(tl.float32)
    tl.store(x + at, product, mask=exists)


def gelu_constants(approximate: str) -> dict[str, float]:
    """The constants of :func:`gelu_with_derivative` for a key of :data:`GELUS`."""
    return dict(zip(("SLOPE", "CUBIC"), GELUS[approximate], strict=True))


def _whole_rows(x: Tensor, centred: bool) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the constants of a kernel whose programs have whole rows of x [rows, D]."""
    rows, width = x.shape
    padded = triton.next_power_of_2(width)
    block_rows = max(1, TILE // padded)
    constants = {
        "D": width,
        "CENTRED": centred,
        "BLOCK_ROWS": block_rows,
        "BLOCK_D": padded,
        "num_warps": min(16, max(4, padded // 256)),
    }
    return (triton.cdiv(rows, block_rows),), constants


def add_normalize_(
    x: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    eps: float,
    normalized: Tensor,
    rstd: Tensor,
    centred: bool = True,
) -> None:
    """See :func:`smi_fast.engine.reference.add_normalize_`; D is at most a few thousand."""
    if added is None or bias is None:
        added = bias = None
    grid, constants = _whole_rows(x, centred)
    launch(_add_normalize, grid, x, x, added, bias, normalized, rstd, eps, len(x), **constants)


def normalize_backward_(
    gradient: Tensor,
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    copy: Tensor | None,
    centred: bool = True,
) -> None:
    """See :func:`smi_fast.engine.reference.normalize_backward_`."""
    grid, constants = _whole_rows(gradient, centred)
    tensors = gradient, grad, normalized, rstd, copy
    launch(_normalize_backward, grid, gradient, *tensors, len(gradient), **constants)


def gelu_(x: Tensor, bias: Tensor, out: Tensor, approximate: str = "none") -> None:
    """See :func:`smi_fast.engine.reference.gelu_`."""
    rows, width = x.shape
    block_rows = TILE // COLUMNS
    grid = triton.cdiv(rows, block_rows), triton.cdiv(width, COLUMNS)
    sizes = {"BLOCK_ROWS": block_rows, "BLOCK_F": COLUMNS, "num_warps": 4}
    launch(_gelu, grid, x, x, bias, out, rows, F=width, **gelu_constants(approximate), **sizes)


def multiply_(x: Tensor, factors: Tensor) -> None:
    """See :func:`smi_fast.engine.reference.multiply_`."""
    count = x.numel()
    launch(_multiply, (triton.cdiv(count, TILE),), x, x, factors, count, BLOCK=TILE, num_warps=4)
