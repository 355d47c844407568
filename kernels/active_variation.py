"""total_variation where only some patches are active: these and their rims are visited.

The forward kernel has a program for each active patch. It takes the pairs of pixels that begin in
its patch, and those that end there and begin in a patch that isn't active. The backward kernel has
a program for each patch of the grid, and reads nothing where no patch around is active.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.grid import NEIGHBOURS
from ._launch import launch
from .gather_patches import _nearest_cells, _wrapped

OFFSETS = tl.constexpr(NEIGHBOURS)
BLOCK_K = 64


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _around(active, row, column, K, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bit 3 (r + 1) + c + 1 is set if the patch r rows below and c columns beside is active."""
    bits = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        cell = tl.load(active + slot, mask=slot < K, other=0).to(tl.int32)
        below = cell // COLUMNS - row + 1
        beside = cell % COLUMNS - column + 1
        near = (slot < K) & (below >= 0) & (below < 3) & (beside >= 0) & (beside < 3)
        # A patch may repeat, so bits aren't added.
        bits |= tl.where(near, 1 << tl.where(near, 3 * below + beside, 0), 0)
    return tl.reduce(bits, 0, _either)


@triton.jit
def _pair(
    bits,
    row,
    column,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Where the neighbour of each pixel of a patch is in a plane; whether there is one, and 1 where
    its patch is active.
    """
    inside = tl.arange(0, BLOCK_P)
    in_patch = (inside < P)[:, None] & (inside < P)[None, :]
    down = inside + DOWN
    right = inside + RIGHT
    v = row * P + down
    u = column * P + right
    exists = ((v >= 0) & (v < HEIGHT))[:, None] & ((u >= 0) & (u < WIDTH))[None, :] & in_patch
    below = (down >= P).to(tl.int32) - (down < 0).to(tl.int32)
    beside = (right >= P).to(tl.int32) - (right < 0).to(tl.int32)
    bit = (3 * below + 4)[:, None] + beside[None, :]
    return v[:, None] * WIDTH + u[None, :], exists, (bits >> bit) & 1


@triton.jit
def _here(row, column, WIDTH: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where the pixels of a patch are in a plane, and which of a program's are pixels."""
    inside = tl.arange(0, BLOCK_P)
    at = (row * P + inside)[:, None] * WIDTH + (column * P + inside)[None, :]
    return at, (inside < P)[:, None] & (inside < P)[None, :]


@triton.jit
def _slot(kept, cell, K, BLOCK_K: tl.constexpr):
    """1 + the place of a patch in kept; 0 if it isn't kept."""
    found = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        cells = tl.load(kept + slot, mask=slot < K, other=-1).to(tl.int32)
        found = tl.maximum(found, tl.where(cells == cell, slot + 1, 0))
    return tl.max(found, 0)


@triton.jit
def _windows(
    kept,
    shift,
    flip,
    row,
    column,
    K,
    shift_axis,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where the pixels of a patch are in the first channel of gathered windows [K, C, P, P], and
    which are in a window of a kept patch. The windows of four patches meet in one.
    """
    ROWS: tl.constexpr = HEIGHT // P
    COLUMNS: tl.constexpr = WIDTH // P
    inside = tl.arange(0, BLOCK_P)
    down = _wrapped(shift, HEIGHT)
    right = _wrapped(shift + shift_axis, WIDTH)
    y = (row * P + down) % HEIGHT
    x = (column * P + right) % WIDTH
    above = (y // P - _nearest_cells(down, P) + ROWS) % ROWS
    left = (x // P - _nearest_cells(right, P) + COLUMNS) % COLUMNS
    below = (above + 1) % ROWS
    beside = (left + 1) % COLUMNS
    lower = (y % P + inside >= P)[:, None]
    further = (x % P + inside >= P)[None, :]
    slot = tl.where(
        lower,
        tl.where(
            further,
            _slot(kept, below * COLUMNS + beside, K, BLOCK_K),
            _slot(kept, below * COLUMNS + left, K, BLOCK_K),
        ),
        tl.where(
            further,
            _slot(kept, above * COLUMNS + beside, K, BLOCK_K),
            _slot(kept, above * COLUMNS + left, K, BLOCK_K),
        ),
    )
    across = (x + inside) % P
    across = tl.where(tl.load(flip), P - 1 - across, across)
    at = (slot - 1) * (C * P * P) + ((y + inside) % P * P)[:, None] + across[None, :]
    return at, (slot > 0) & (inside < P)[:, None] & (inside < P)[None, :]


@triton.jit
def _active_variation_fwd(
    images,  # [B, C, HEIGHT, WIDTH]
    active,  # int64 [B, K]
    partials,  # float32 [3, 4, programs]
    K,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH // P
    batch = tl.program_id(1).to(tl.int64)
    program = batch * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    active += batch * K
    images += batch * (C * HEIGHT * WIDTH)
    cell = tl.load(active + tl.program_id(0)).to(tl.int32)
    row = cell // COLUMNS
    column = cell % COLUMNS
    bits = _around(active, row, column, K, COLUMNS, BLOCK_K)
    # Where a patch repeats, only its first program counts.
    repeats = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, tl.program_id(0), BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        before = tl.load(active + slot, mask=slot < tl.program_id(0), other=-1).to(tl.int32)
        repeats += (before == cell).to(tl.int32)
    at, mask = _here(row, column, WIDTH, P, BLOCK_P)
    mask &= tl.arange(0, BLOCK_P)[:, None] < tl.where(tl.sum(repeats) > 0, 0, P)
    for i in tl.static_range(4):
        absolute = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
        squares = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
        count = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
        for end in tl.static_range(-1, 2, 2):
            there_at, counted, there_active = _pair(
                bits,
                row,
                column,
                end * OFFSETS[i][0],
                end * OFFSETS[i][1],
                HEIGHT,
                WIDTH,
                P,
                BLOCK_P,
            )
            counted = counted & mask
            if end == -1:
                counted = counted & (there_active == 0)
            for c in tl.static_range(C):
                plane = images + c * (HEIGHT * WIDTH)
                here = tl.load(plane + at, mask=mask, other=0.0).to(tl.float32)
                there = tl.load(plane + there_at, mask=counted, other=0.0).to(tl.float32)
                d = tl.where(counted, here - there, 0.0)
                absolute += tl.abs(d)
                squares += d * d
            count += C * counted.to(tl.float32)
        tl.store(partials + i * programs + program, tl.sum(absolute))
        tl.store(partials + (4 + i) * programs + program, tl.sum(squares))
        tl.store(partials + (8 + i) * programs + program, tl.sum(count))


@triton.jit
def _active_variation_bwd(
    grad_l1,  # float32 []
    grad_l2,  # float32 []
    images,  # [B, C, HEIGHT, WIDTH]
    active,  # int64 [B, K]
    sums,  # float32 [3, 4]
    gradient,  # [B, C, HEIGHT, WIDTH]
    windows,  # [B, K, C * P * P], gradient of the windows of the active patches, or None
    shift,  # int64 [B, 2], any strides, or None
    flip,  # bool [B], any stride, or None
    windows_image,
    shift_image,
    shift_axis,
    flip_image,
    K,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH // P
    batch = tl.program_id(1).to(tl.int64)
    offset = batch * (C * HEIGHT * WIDTH)
    row = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    bits = _around(active + batch * K, row, column, K, COLUMNS, BLOCK_K)
    here_active = (bits >> 4) & 1
    at, mask = _here(row, column, WIDTH, P, BLOCK_P)
    read = mask & (tl.arange(0, BLOCK_P)[:, None] < tl.where(bits == 0, 0, P))
    if windows is not None:
        window_at, in_window = _windows(
            active + batch * K,
            shift + batch * shift_image,
            flip + batch * flip_image,
            row,
            column,
            K,
            shift_axis,
            C,
            HEIGHT,
            WIDTH,
            P,
            BLOCK_P,
            BLOCK_K,
        )
        windows += batch * windows_image
    for c in tl.static_range(C):
        plane = images + offset + c * (HEIGHT * WIDTH)
        here = tl.load(plane + at, mask=read, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
        if windows is not None:
            own = windows + c * (P * P) + window_at
            total = tl.load(own, mask=in_window, other=0.0).to(tl.float32)
        for i in tl.static_range(4):
            norm = tl.load(sums + 4 + i)
            count = tl.load(sums + 8 + i)
            # d|d|/dd = sign(d) and d‖d‖/dd = d/‖d‖; a norm of zero has the subgradient zero.
            per_norm = tl.where(norm > 0, tl.load(grad_l2) / norm, 0.0)
            per_count = tl.where(count > 0, tl.load(grad_l1) / count, 0.0)
            # The slope is odd in d, so here − there gives the gradient at either end of a pair.
            for end in tl.static_range(-1, 2, 2):
                there_at, counted, there_active = _pair(
                    bits,
                    row,
                    column,
                    end * OFFSETS[i][0],
                    end * OFFSETS[i][1],
                    HEIGHT,
                    WIDTH,
                    P,
                    BLOCK_P,
                )
                counted = counted & ((here_active | there_active) != 0)
                there = tl.load(plane + there_at, mask=counted, other=0.0).to(tl.float32)
                d = tl.where(counted, here - there, 0.0)
                total += d * per_norm + tl.where(d > 0, per_count, tl.where(d < 0, -per_count, 0.0))
        tl.store(gradient + offset + c * (HEIGHT * WIDTH) + at, total, mask=mask)


def _constants(images: Tensor, patch_size: int) -> dict[str, int]:
    side = triton.next_power_of_2(patch_size)
    return {
        "C": images.shape[1],
        "HEIGHT": images.shape[2],
        "WIDTH": images.shape[3],
        "P": patch_size,
        "BLOCK_P": side,
        "BLOCK_K": BLOCK_K,
        "num_warps": min(8, max(1, side**2 // 128)),
    }


def active_partials(images: Tensor, active: Tensor, patch_size: int) -> Tensor:
    """Sums float32 [3, 4, programs] of each program: absolute values, squares and counts."""
    batch, kept = active.shape
    partials = images.new_empty(3, 4, batch * kept, dtype=torch.float32)
    tensors = images.contiguous(), active.contiguous(), partials
    constants = _constants(images, patch_size)
    launch(_active_variation_fwd, (kept, batch), images, *tensors, kept, **constants)
    return partials


def active_gradient(
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    active: Tensor,
    patch_size: int,
    sums: Tensor,
    windows: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradient [B, C, H, W] of the images, zero away from active patches and their rims.

    With the gradient [B, K, C·P·P] of the windows of active patches, their shift int64 [B, 2] and
    flip bool [B], it is also that of the gathered windows.
    """
    batch, kept = active.shape
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    cells = images.shape[2] // patch_size * (images.shape[3] // patch_size)
    tensors = grad_l1, grad_l2, images.contiguous(), active.contiguous(), sums, gradient
    jitter: tuple[Any, ...] = (None,) * 7
    if windows is not None:
        grad, shift, flip = windows
        if grad.stride()[1:] != (grad.shape[2], 1):
            grad = grad.contiguous()
        jitter = grad, shift, flip, grad.stride(0), *shift.stride(), *flip.stride()
    constants = _constants(images, patch_size)
    launch(_active_variation_bwd, (cells, batch), images, *tensors, *jitter, kept, **constants)
    return gradient


def pixel_gradient(
    grad: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    patch_size: int,
    sums: Tensor,
) -> Tensor:
    """See :func:`smi_fast.engine.iteration_reference.pixel_gradient`."""
    windows = grad, shift, flip
    return active_gradient(grad_l1, grad_l2, images, kept, patch_size, sums, windows)
