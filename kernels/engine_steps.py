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
    x,  # [ROWS, D], or the first R rows of images, each with a stride
    added,  # [ROWS, D], or None
    bias,  # float32 [D], or None
    out,  # float32 [ROWS, D], gets the sum; or None
    normalized,  # [ROWS, D]
    rstd,  # float32 [ROWS]
    weight,  # float32 [D], or None
    shift,  # float32 [D], or None
    scaled,  # float32 [ROWS, D], gets normalized * weight + shift; or None
    eps,
    R,
    stride,
    ROWS,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, exists = _rows(ROWS, D, BLOCK_ROWS, BLOCK_D)
    column = tl.arange(0, BLOCK_D)
    x_at = at
    if R is not None:
        x_at = (row // R * stride + row % R * D)[:, None] + column[None, :]
    values = tl.load(x + x_at, mask=exists, other=0.0).to(tl.float32)
    if added is not None:
        constant = tl.load(bias + column, mask=column < D, other=0.0)
        values += tl.load(added + at, mask=exists, other=0.0).to(tl.float32) + constant[None, :]
    if out is not None:
        tl.store(out + at, values, mask=exists)
    centred = values
    if CENTRED:
        mean = tl.sum(values, 1) / D
        centred = tl.where(exists, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    # A variance that overflows would make a row of zeros, which looks like a result.
    scale = tl.where(variance < float("inf"), tl.rsqrt(variance + eps), float("nan"))
    tl.store(rstd + row, scale, mask=row < ROWS)
    result = centred * scale[:, None]
    tl.store(normalized + at, result, mask=exists)
    if scaled is not None:
        result *= tl.load(weight + column, mask=column < D, other=0.0)[None, :]
        if shift is not None:
            result += tl.load(shift + column, mask=column < D, other=0.0)[None, :]
        tl.store(scaled + at, result, mask=exists)


@triton.jit
def _normalize_backward(
    residual,  # float32 [ROWS, D], or [images, R, D] of the first rows of images of N; or None
    grad,  # [ROWS, D]
    normalized,  # [ROWS, D]
    rstd,  # float32 [ROWS]
    weight,  # float32 [D], or None
    gradient,  # float32 [ROWS, D]
    copy,  # [ROWS, D], or None
    R,
    N,
    ROWS,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, exists = _rows(ROWS, D, BLOCK_ROWS, BLOCK_D)
    column = tl.arange(0, BLOCK_D)
    d = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
    if weight is not None:
        d *= tl.load(weight + column, mask=column < D, other=0.0)[None, :]
    n = tl.load(normalized + at, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row, mask=row < ROWS, other=0.0)
    # dx = rstd (d − mean(d) − n mean(d ∘ n)), without mean(d) in RMSNorm.
    slope = tl.sum(d * n, 1) / D
    change = d - n * slope[:, None]
    if CENTRED:
        mean = tl.sum(d, 1) / D
        change -= mean[:, None]
    total = scale[:, None] * change
    if residual is not None:
        from_at = at
        has = exists
        if R is not None:
            from_at = ((row // N * R + row % N) * D)[:, None] + column[None, :]
            has = exists & (row % N < R)[:, None]
        total += tl.load(residual + from_at, mask=has, other=0.0)
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
    results = None if added is None else x, normalized, rstd, None, None, None
    sizes = eps, None, None, len(x)
    launch(_add_normalize, grid, x, x, added, bias, *results, *sizes, **constants)


def add_normalize_rows_(
    x: Tensor,
    added: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    centred: bool = True,
) -> None:
    """See :func:`smi_fast.engine.reference.add_normalize_rows_`."""
    grid, constants = _whole_rows(out, centred)
    tensors = x, added, bias, out, normalized, rstd, None, None, None
    sizes = eps, x.shape[1], x.stride(0), len(out)
    launch(_add_normalize, grid, x, *tensors, *sizes, **constants)


def final_norm_(
    x: Tensor,
    added: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    normalized: Tensor,
    rstd: Tensor,
    out: Tensor,
    centred: bool = True,
) -> None:
    """See :func:`smi_fast.engine.reference.final_norm_`."""
    grid, constants = _whole_rows(x, centred)
    tensors = x, added, bias, None, normalized, rstd, weight, shift, out
    launch(_add_normalize, grid, x, *tensors, eps, None, None, len(x), **constants)


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
    tensors = gradient, grad, normalized, rstd, None, gradient, copy
    launch(_normalize_backward, grid, grad, *tensors, None, None, len(gradient), **constants)


def normalize_backward_rows_(
    of_rows: Tensor,
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    centred: bool = True,
) -> None:
    """See :func:`smi_fast.engine.reference.normalize_backward_rows_`."""
    grid, constants = _whole_rows(gradient, centred)
    tensors = of_rows, grad, normalized, rstd, None, gradient, copy
    count = len(gradient) // max(1, len(of_rows))
    sizes = of_rows.shape[1], count, len(gradient)
    launch(_normalize_backward, grid, grad, *tensors, *sizes, **constants)


def final_norm_backward_(
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    centred: bool = True,
) -> None:
    """See :func:`smi_fast.engine.reference.final_norm_backward_`."""
    grid, constants = _whole_rows(gradient, centred)
    tensors = None, grad, normalized, rstd, weight, gradient, copy
    launch(_normalize_backward, grid, grad, *tensors, None, None, len(gradient), **constants)


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
