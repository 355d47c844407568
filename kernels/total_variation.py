"""total_variation: all four differences of a pixel from one visit, and the gradient from another.

Sums are two-stage: each program leaves its own, a second kernel adds them up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.grid import NEIGHBOURS, patch_mask
from ._launch import launch

# Larger tiles share more of their rims; backward keeps eight neighbours of each pixel in registers.
BLOCK_FWD, BLOCK_BWD = 4096, 2048
OFFSETS = tl.constexpr(NEIGHBOURS)


@triton.jit
def _difference(
    plane,  # [HEIGHT, WIDTH]
    patches,  # bool [rows, columns], or None: all are kept
    here,
    here_kept,
    y,
    x,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
):
    """here − there for the neighbour at an offset, zero where it doesn't count; where it does."""
    v = y + DOWN
    u = x + RIGHT
    counted = (y < HEIGHT) & (v >= 0) & (v < HEIGHT) & (u >= 0) & (u < WIDTH)
    if patches is not None:
        there_kept = tl.load(patches + (v // P) * (WIDTH // P) + u // P, mask=counted, other=0)
        counted &= here_kept | there_kept
    there = tl.load(plane + v * WIDTH + u, mask=counted, other=0.0).to(tl.float32)
    return tl.where(counted, here - there, 0.0), counted


@triton.jit
def _pixels(
    plane, patches, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of the pixels of a plane: value, whether kept, row and column."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = pixel // WIDTH
    x = pixel % WIDTH
    inside = pixel < HEIGHT * WIDTH
    kept = inside
    if patches is not None:
        kept = tl.load(patches + (y // P) * (WIDTH // P) + x // P, mask=inside, other=0)
    return tl.load(plane + pixel, mask=inside, other=0.0).to(tl.float32), kept, y, x


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
    here, kept, y, x = _pixels(plane, patches, HEIGHT, WIDTH, P, BLOCK)
    for i in tl.static_range(4):
        d, counted = _difference(
            plane, patches, here, kept, y, x, OFFSETS[i][0], OFFSETS[i][1], HEIGHT, WIDTH, P
        )
        tl.store(partials + i * programs + program, tl.sum(tl.abs(d)))
        tl.store(partials + (4 + i) * programs + program, tl.sum(d * d))
        tl.store(partials + (8 + i) * programs + program, tl.sum(counted.to(tl.float32)))


@triton.jit
def _total_variation_finish(
    partials,  # float32 [3, 4, PROGRAMS]
    parts,  # [3, 4]
    PROGRAMS,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PROGRAMS, BLOCK):
        program = start + tl.arange(0, BLOCK)
        at = partials + part.to(tl.int64) * PROGRAMS + program
        total += tl.load(at, mask=program < PROGRAMS, other=0.0)
    result = tl.sum(total)
    tl.store(parts + part, tl.where(part // 4 == 1, tl.sqrt(result), result))


@triton.jit
def _total_variation_bwd(
    grad_l1,  # []
    grad_l2,  # []
    images,  # [B, C, HEIGHT, WIDTH]
    patches,  # bool [B, rows, columns], or None
    parts,  # [3, 4]
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
    here, kept, y, x = _pixels(plane, patches, HEIGHT, WIDTH, P, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        norm = tl.load(parts + 4 + i).to(tl.float32)
        count = tl.load(parts + 8 + i).to(tl.float32)
        # d|d|/dd = sign(d), d‖d‖/dd = d/‖d‖, the subgradient of a norm of zero is zero.
        per_norm = tl.where(norm > 0, tl.load(grad_l2).to(tl.float32) / norm, 0.0)
        per_count = tl.where(count > 0, tl.load(grad_l1).to(tl.float32) / count, 0.0)
        # The slope is odd in d, so a pixel gets it from here − there at either end of a pair.
        for end in tl.static_range(-1, 2, 2):
            d, _ = _difference(
                plane,
                patches,
                here,
                kept,
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


def _patches(images: Tensor, kept: Tensor | None, patch_size: int) -> Tensor | None:
    if kept is None:
        return None
    return patch_mask(kept, images.shape[2] // patch_size, images.shape[3] // patch_size)


def total_variation(images: Tensor, kept: Tensor | None, patch_size: int) -> Tensor:
    """Parts [3, 4]: for each difference the sum of absolute values, the norm and the count."""
    batch, channels, height, width = images.shape
    grid = (batch * channels, triton.cdiv(height * width, BLOCK_FWD))
    partials = images.new_empty(3, 4, grid[0] * grid[1], dtype=torch.float32)
    parts = images.new_empty(3, 4)
    launch(
        _total_variation_fwd,
        grid,
        images,
        images.contiguous(),
        _patches(images, kept, patch_size),
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
        parts,
        partials.shape[2],
        BLOCK=1024,
        num_warps=4,
    )
    return parts


def total_variation_backward(
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    kept: Tensor | None,
    patch_size: int,
    parts: Tensor,
) -> Tensor:
    """Gradient [B, C, H, W] of the images."""
    batch, channels, height, width = images.shape
    # Pixels of two bytes take registers to convert.
    block = BLOCK_BWD if images.dtype == torch.float32 else BLOCK_BWD // 2
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    launch(
        _total_variation_bwd,
        (batch * channels, triton.cdiv(height * width, block)),
        images,
        grad_l1,
        grad_l2,
        images.contiguous(),
        _patches(images, kept, patch_size),
        parts,
        gradient,
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK=block,
        num_warps=16,
    )
    return gradient
