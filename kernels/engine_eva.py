"""The steps of the engine that blocks of Eva have beside those of a plain ViT: SwiGLU and rotary
positions, one kernel each way.

They compute in float32. What products read and write may be half precision, and is rounded once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .engine_steps import COLUMNS, tile

# Elements of SwiGLU's output in a program of four warps.
SWIGLU_TILE = 1024
# Tokens of a program that rotates. They share loads of the bias, and its heads those of the angles.
TOKENS = 8


@triton.jit
def _swiglu(
    x,  # [ROWS, 2 F], becomes the derivatives
    bias,  # float32 [2 F]
    out,  # [ROWS, F]
    ROWS,
    F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, column, at, exists = tile(ROWS, F, BLOCK_ROWS, BLOCK_F)
    at_gate = row[:, None] * (2 * F) + column[None, :]
    of_gate = tl.load(bias + column, mask=column < F, other=0.0)
    of_up = tl.load(bias + F + column, mask=column < F, other=0.0)
    gate = tl.load(x + at_gate, mask=exists, other=0.0).to(tl.float32) + of_gate[None, :]
    up = tl.load(x + at_gate + F, mask=exists, other=0.0).to(tl.float32) + of_up[None, :]
    s = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * s
    tl.store(out + at, silu * up, mask=exists)
    tl.store(x + at_gate, up * (s + silu * (1.0 - s)), mask=exists)
    tl.store(x + at_gate + F, silu, mask=exists)


@triton.jit
def _swiglu_backward(
    grad,  # [ROWS, F]
    factors,  # [ROWS, 2 F]
    d_x,  # [ROWS, 2 F]
    ROWS,
    F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, column, at, exists = tile(ROWS, F, BLOCK_ROWS, BLOCK_F)
    at_gate = row[:, None] * (2 * F) + column[None, :]
    d = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
    of_gate = tl.load(factors + at_gate, mask=exists, other=0.0).to(tl.float32)
    of_up = tl.load(factors + at_gate + F, mask=exists, other=0.0).to(tl.float32)
    tl.store(d_x + at_gate, d * of_gate, mask=exists)
    tl.store(d_x + at_gate + F, d * of_up, mask=exists)


@triton.jit
def _rotate(
    x,  # [B, TOKENS, PARTS, H, D], changed
    bias,  # float32 [CHANGED, H, D], or None
    rotation,  # float32 [B, PATCHES, OWN, 2 D], sines and cosines
    BATCH,
    TOKENS,
    PATCHES,
    PARTS: tl.constexpr,
    CHANGED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    OWN: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pair = tl.arange(0, BLOCK_PAIRS)
    is_pair = pair < D // 2
    exists = (token < BATCH * TOKENS)[:, None] & is_pair[None, :]
    # A pair's two channels belong to one thread, which writes both after it has read both.
    if HALF:
        first, second = pair, pair + D // 2
    else:
        first, second = 2 * pair, 2 * pair + 1
    # Prefix tokens, which come first, have an angle of zero.
    patch = token % TOKENS - (TOKENS - PATCHES)
    turns = exists & (patch >= 0)[:, None]
    angles = (token // TOKENS * PATCHES + patch).to(tl.int64)[:, None] * (OWN * 2 * D)
    to_a, to_b = rotation + angles + first[None, :], rotation + angles + second[None, :]
    sine_a, sine_b, cosine_a, cosine_b = _turns(to_a, to_b, turns, D)
    row = token.to(tl.int64)[:, None] * (PARTS * H * D)
    for head in range(CHANGED * H):
        if OWN > 1:
            own = head % H * (2 * D)
            sine_a, sine_b, cosine_a, cosine_b = _turns(to_a + own, to_b + own, turns, D)
        at_a, at_b = head * D + first, head * D + second
        a = tl.load(x + row + at_a[None, :], mask=exists, other=0.0).to(tl.float32)
        b = tl.load(x + row + at_b[None, :], mask=exists, other=0.0).to(tl.float32)
        if bias is not None:
            a += tl.load(bias + at_a, mask=is_pair, other=0.0)[None, :]
            b += tl.load(bias + at_b, mask=is_pair, other=0.0)[None, :]
        if BACK:
            turned_a, turned_b = b * sine_b, -a * sine_a
        else:
            turned_a, turned_b = -b * sine_a, a * sine_b
        tl.store(x + row + at_a[None, :], a * cosine_a + turned_a, mask=exists)
        tl.store(x + row + at_b[None, :], b * cosine_b + turned_b, mask=exists)


@triton.jit
def _turns(to_a, to_b, turns, D: tl.constexpr):
    """The sines and cosines of each pair's two channels."""
    sine_a = tl.load(to_a, mask=turns, other=0.0)
    sine_b = tl.load(to_b, mask=turns, other=0.0)
    cosine_a = tl.load(to_a + D, mask=turns, other=1.0)
    cosine_b = tl.load(to_b + D, mask=turns, other=1.0)
    return sine_a, sine_b, cosine_a, cosine_b


def swiglu_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """See :func:`smi_fast.engine.reference.swiglu_`."""
    _by_tiles(_swiglu, out, x, bias, out)


def swiglu_backward_(grad: Tensor, factors: Tensor, d_x: Tensor) -> None:
    """See :func:`smi_fast.engine.reference.swiglu_backward_`."""
    _by_tiles(_swiglu_backward, grad, grad, factors, d_x)


def _by_tiles(kernel: Any, like: Tensor, *tensors: Tensor) -> None:
    """Start a kernel whose programs have tiles of a tensor [rows, F]."""
    rows, width = like.shape
    block_rows = SWIGLU_TILE // COLUMNS
    grid = triton.cdiv(rows, block_rows), triton.cdiv(width, COLUMNS)
    sizes = {"F": width, "BLOCK_ROWS": block_rows, "BLOCK_F": COLUMNS, "num_warps": 4}
    launch(kernel, grid, like, *tensors, rows, **sizes)


def rotate_(x: Tensor, bias: Tensor, rotation: Tensor, half: bool) -> None:
    """See :func:`smi_fast.engine.reference.rotate_`; all tensors are contiguous."""
    changed = bias.numel() // (x.shape[3] * x.shape[4])
    _turn(x, bias, changed, rotation, half, back=False)


def rotate_backward_(gradient: Tensor, parts: int, rotation: Tensor, half: bool) -> None:
    """See :func:`smi_fast.engine.reference.rotate_backward_`; all tensors are contiguous."""
    _turn(gradient, None, parts, rotation, half, back=True)


def _turn(
    x: Tensor, bias: Tensor | None, changed: int, rotation: Tensor, half: bool, back: bool
) -> None:
    batch, tokens, parts, heads, width = x.shape
    constants = {
        "PARTS": parts,
        "CHANGED": changed,
        "H": heads,
        "D": width,
        "OWN": rotation.shape[2],
        "HALF": half,
        "BACK": back,
        "BLOCK_TOKENS": TOKENS,
        "BLOCK_PAIRS": triton.next_power_of_2(width // 2),
        "num_warps": 4,
    }
    grid, sizes = (triton.cdiv(batch * tokens, TOKENS),), (batch, tokens, rotation.shape[1])
    launch(_rotate, grid, x, x, bias, rotation, *sizes, **constants)
