"""total_variation: one pass over the pixels for the four differences, one more for the gradient.

Sums take two stages. Each program stores its own sums, and a second kernel adds them up in a fixed
order, so every run gives the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.grid import NEIGHBOURS, patch_mask
from ._launch import launch

# Pixels of a tile. Neighbours outside of the tile are loaded again, so large tiles load less.
# Backward keeps eight neighbours of each pixel in registers, so its tiles are smaller.
BLOCK_FWD, BLOCK_BWD = 4096, 2048
OFFSETS = tl.constexpr(NEIGHBOURS)


@triton.jit
def _difference(
    plane,  # [HEIGHT, WIDTH]
    patches,  # bool [rows, columns], true where active, or None when all are
    here,
    here_active,
    y,
    x,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
):
    """here − there for the neighbour at an offset, zero where uncounted; and which are counted."""
    v = y + DOWN
    u = x + RIGHT
    counted = (y < HEIGHT) & (v >= 0) & (v < HEIGHT) & (u >= 0) & (u < WIDTH)
    if patches is not None:
        there_active = tl.load(patches + (v // P) * (WIDTH // P) + u // P, mask=counted, other=0)
        counted &= here_active | there_active
    there = tl.load(plane + v * WIDTH + u, mask=counted, other=0.0).to(tl.float32)
    return tl.where(counted, here - there, 0.0), counted


@triton.jit
def _pixels(
    plane, patches, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of the pixels of a plane: value, whether its patch is active, row and column."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = pixel // WIDTH
    x = pixel % WIDTH
    inside = pixel < HEIGHT * WIDTH
    active = inside
    if patches is not None:
        active = tl.load(patches + (y // P) * (WIDTH // P) + x // P, mask=inside, other=0)
    return tl.load(plane + pixel, mask=inside, other=0.0).to(tl.float32), active, y, x


@triton.jit
def _total_variation_fwd(
    images,  # [B, C, HEIGHT, WIDTH]
    patches,  # bool [B, rows, columns], or None
    partials,  # float32 [3, 4, programs]
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    plane = images + tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH)
    if patches is not None:
        patches += (tl.program_id(0) // C) * ((HEIGHT // P) * (WIDTH // P))
    here, active, y, x = _pixels(plane, patches, HEIGHT, WIDTH, P, BLOCK)
    for i in tl.static_range(4):
        d, counted = _difference(
            plane, patches, here, active, y, x, OFFSETS[i][0], OFFSETS[i][1], HEIGHT, WIDTH, P
        )
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
    patches,  # bool [B, rows, columns], or None
    sums,  # float32 [3, 4]
    gradient,  # [B, C, HEIGHT, WIDTH]
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH)
    plane = images + offset
    if patches is not None:
        patches += (tl.program_id(0) // C) * ((HEIGHT // P) * (WIDTH // P))
    here, active, y, x = _pixels(plane, patches, HEIGHT, WIDTH, P, BLOCK)
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
                plane,
                patches,
                here,
                active,
                y,
                x,
                end * OFFSETS[i][0],
                end * OFFSETS[i][1],
                HEIGHT,
                WIDTH,
                P,
            )
            total += d * per_norm + tl.where(d > 0, per_count, tl.where(d < 0, -per_count, 0.0))
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(gradient + offset + pixel, total, mask=pixel < HEIGHT * WIDTH)


def _patches(images: Tensor, active: Tensor | None, patch_size: int) -> Tensor | None:
    """Which patches are active, bool [B, rows, columns], or None for all."""
    if active is None:
        return None
    return patch_mask(active, images.shape[2] // patch_size, images.shape[3] // patch_size)


def total_variation(images: Tensor, active: Tensor | None, patch_size: int) -> Tensor:
    """Sums float32 [3, 4]: absolute values, norm and count of each of the four differences."""
    batch, channels, height, width = images.shape
    grid = (batch * channels, triton.cdiv(height * width, BLOCK_FWD))
    partials = images.new_empty(3, 4, grid[0] * grid[1], dtype=torch.float32)
    sums = images.new_empty(3, 4, dtype=torch.float32)
    launch(
        _total_variation_fwd,
        grid,
        images,
        images.contiguous(),
        _patches(images, active, patch_size),
        partials,
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK=BLOCK_FWD,
        num_warps=32,
    )
    launch(
        _total_variation_finish,
        (12,),
        images,
        partials,
        sums,
        partials.shape[2],
        BLOCK=1024,
        num_warps=4,
    )
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
    batch, channels, height, width = images.shape
    # float16 and bfloat16 pixels need more registers, for the conversion to float32.
    block = BLOCK_BWD if images.dtype == torch.float32 else BLOCK_BWD // 2
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    launch(
        _total_variation_bwd,
        (batch * channels, triton.cdiv(height * width, block)),
        images,
        grad_l1,
        grad_l2,
        images.contiguous(),
        _patches(images, active, patch_size),
        sums,
        gradient,
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK=block,
        num_warps=16,
    )
    return gradient
