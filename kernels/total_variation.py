"""total_variation: one pass over the pixels for the four differences, one more for the gradient.

Sums take two stages. Each program stores its own sums, and a second kernel adds them up in a fixed
order, so every run gives the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.grid import NEIGHBOURS
from ._launch import launch
from .active_variation import active_gradient, active_partials

# Pixels of a tile. Neighbours outside of the tile are loaded again, so large tiles load less.
# Backward keeps eight neighbours of each pixel in registers, so its tiles are smaller.
BLOCK_FWD, BLOCK_BWD = 4096, 2048
OFFSETS = tl.constexpr(NEIGHBOURS)


@triton.jit
def _difference(
    plane,  # [HEIGHT, WIDTH]
    here,
    y,
    x,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """here − there for the neighbour at an offset, zero where there is none; and where there is."""
    v = y + DOWN
    u = x + RIGHT
    counted = (y < HEIGHT) & (v >= 0) & (v < HEIGHT) & (u >= 0) & (u < WIDTH)
    there = tl.load(plane + v * WIDTH + u, mask=counted, other=0.0).to(tl.float32)
    return tl.where(counted, here - there, 0.0), counted


@triton.jit
def _pixels(plane, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of the pixels of a plane: value, row and column."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HEIGHT * WIDTH
    value = tl.load(plane + pixel, mask=inside, other=0.0).to(tl.float32)
    return value, pixel // WIDTH, pixel % WIDTH


@triton.jit
def _total_variation_fwd(
    images,  # [B, C, HEIGHT, WIDTH]
    partials,  # float32 [3, 4, programs]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    plane = images + tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH)
    here, y, x = _pixels(plane, HEIGHT, WIDTH, BLOCK)
    for i in tl.static_range(4):
        d, counted = _difference(plane, here, y, x, OFFSETS[i][0], OFFSETS[i][1], HEIGHT, WIDTH)
        tl.store(partials + i * programs + program, tl.sum(tl.abs(d)))
        tl.store(partials + (4 + i) * programs + program, tl.sum(d * d))
        tl.store(partials + (8 + i) * programs + program, tl.sum(counted.to(tl.float32)))


@triton.jit
def _total_variation_finish(
    partials,  # float32 [3, 4, PROGRAMS]
    sums,  # float32 [3, 4]
    PROGRAMS,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PROGRAMS, BLOCK):
        program = start + tl.arange(0, BLOCK)
        at = partials + index.to(tl.int64) * PROGRAMS + program
        total += tl.load(at, mask=program < PROGRAMS, other=0.0)
    result = tl.sum(total)
    tl.store(sums + index, tl.where(index // 4 == 1, tl.sqrt(result), result))


@triton.jit
def _total_variation_bwd(
    grad_l1,  # float32 []
    grad_l2,  # float32 []
    images,  # [B, C, HEIGHT, WIDTH]
    sums,  # float32 [3, 4]
    gradient,  # [B, C, HEIGHT, WIDTH]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH)
    plane = images + offset
    here, y, x = _pixels(plane, HEIGHT, WIDTH, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        norm = tl.load(sums + 4 + i)
        count = tl.load(sums + 8 + i)
        # d|d|/dd = sign(d) and d‖d‖/dd = d/‖d‖; a norm of zero has the subgradient zero.
        per_norm = tl.where(norm > 0, tl.load(grad_l2) / norm, 0.0)
        per_count = tl.where(count > 0, tl.load(grad_l1) / count, 0.0)
        # The slope is odd in d, so here − there gives the pixel's gradient at either end of a pair.
        for end in tl.static_range(-1, 2, 2):
            d, _ = _difference(
                plane, here, y, x, end * OFFSETS[i][0], end * OFFSETS[i][1], HEIGHT, WIDTH
            )
            total += d * per_norm + tl.where(d > 0, per_count, tl.where(d < 0, -per_count, 0.0))
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(gradient + offset + pixel, total, mask=pixel < HEIGHT * WIDTH)


def _partials(images: Tensor) -> Tensor:
    """Sums float32 [3, 4, programs] of each program: absolute values, squares and counts."""
    batch, channels, height, width = images.shape
    grid = (batch * channels, triton.cdiv(height * width, BLOCK_FWD))
    partials = images.new_empty(3, 4, grid[0] * grid[1], dtype=torch.float32)
    constants = {"HEIGHT": height, "WIDTH": width, "BLOCK": BLOCK_FWD, "num_warps": 32}
    launch(_total_variation_fwd, grid, images, images.contiguous(), partials, **constants)
    return partials


def total_variation(images: Tensor, active: Tensor | None, patch_size: int) -> Tensor:
    """Sums float32 [3, 4]: absolute values, norm and count of each of the four differences."""
    partials = _partials(images) if active is None else active_partials(images, active, patch_size)
    sums = images.new_empty(3, 4, dtype=torch.float32)
    constants = {"BLOCK": 1024, "num_warps": 4}
    programs = partials.shape[2]
    launch(_total_variation_finish, (12,), images, partials, sums, programs, **constants)
    return sums


def total_variation_backward(
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    active: Tensor | None,
    patch_size: int,
    sums: Tensor,
) -> Tensor:
    """Gradient [B, C, H, W] of the images."""
    if active is not None:
        return active_gradient(grad_l1, grad_l2, images, active, patch_size, sums)
    batch, channels, height, width = images.shape
    # float16 and bfloat16 pixels need more registers, for the conversion to float32.
    block = BLOCK_BWD if images.dtype == torch.float32 else BLOCK_BWD // 2
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    tensors = grad_l1, grad_l2, images.contiguous(), sums, gradient
    grid = (batch * channels, triton.cdiv(height * width, block))
    constants = {"HEIGHT": height, "WIDTH": width, "BLOCK": block, "num_warps": 16}
    launch(_total_variation_bwd, grid, images, *tensors, **constants)
    return gradient
