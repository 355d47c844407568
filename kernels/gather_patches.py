"""gather_patches: reads windows of the un-jittered image, so no rolled and mirrored copy is made.

Shift and flip are read from device memory, so that a captured CUDA graph can be replayed with new
jitter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch


@triton.jit
def _wrapped(shift, SIDE: tl.constexpr):
    """The shift modulo SIDE, in [0, SIDE). SIDE is a multiple of P, so the cells stay the same."""
    return ((tl.load(shift) % SIDE + SIDE) % SIDE).to(tl.int32)


@triton.jit
def _nearest_cells(shift, P: tl.constexpr):
    """Whole patches in a shift of pixels: rounded to the nearest, half upwards."""
    return (2 * shift + P) // (2 * P)


@triton.jit
def _gather_patches_fwd(
    images,  # [B, C, H, W], any strides
    kept,  # int64 [B, K]
    shift,  # int64 [B, 2], any strides
    flip,  # bool [B], any stride
    patches,  # [B, K, C * P * P]
    positions,  # int64 [B, K]
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    shift_image,
    shift_axis,
    flip_image,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    ROWS: tl.constexpr = HEIGHT // P
    COLUMNS: tl.constexpr = WIDTH // P
    batch = tl.program_id(1).to(tl.int64)
    slot = batch * tl.num_programs(0) + tl.program_id(0)
    cell = tl.load(kept + slot).to(tl.int32)
    down = _wrapped(shift + batch * shift_image, HEIGHT)
    right = _wrapped(shift + batch * shift_image + shift_axis, WIDTH)
    row = (cell // COLUMNS + _nearest_cells(down, P)) % ROWS
    column = (cell % COLUMNS + _nearest_cells(right, P)) % COLUMNS
    mirrored = tl.load(flip + batch * flip_image)
    landed = tl.where(mirrored, COLUMNS - 1 - column, column)
    tl.store(positions + slot, (row * COLUMNS + landed).to(tl.int64))

    inside = tl.arange(0, BLOCK_P)
    across = tl.where(mirrored, P - 1 - inside, inside)
    y = ((row * P + inside + HEIGHT - down) % HEIGHT).to(tl.int64)
    x = ((column * P + across + WIDTH - right) % WIDTH).to(tl.int64)
    mask = (inside < P)[:, None] & (inside < P)[None, :]
    window = images + batch * stride_b + y[:, None] * stride_y + x[None, :] * stride_x
    patch = patches + slot * (C * P * P) + inside[:, None] * P + inside[None, :]
    for c in tl.static_range(C):
        pixels = tl.load(window + c * stride_c, mask=mask)
        tl.store(patch + c * (P * P), pixels, mask=mask)


@triton.jit
def _gather_patches_bwd(
    grad,  # [B, K, C * P * P], images with a stride
    kept,  # int64 [B, K]
    shift,  # int64 [B, 2], any strides
    flip,  # bool [B], any stride
    images,  # [B, C, H, W]
    stride,
    K,
    shift_image,
    shift_axis,
    flip_image,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The windows of all patches tile the image. This program writes the windows of one row of
    # patches, with zeros for patches that aren't kept, so every pixel is written exactly once.
    ROWS: tl.constexpr = HEIGHT // P
    COLUMNS: tl.constexpr = WIDTH // P
    row = tl.program_id(0)
    channel = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)

    found = tl.zeros([BLOCK_COLUMNS], tl.int32)  # 1 + the patch's place in kept; 0 if it isn't kept
    for start in range(0, K, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        cells = tl.load(kept + batch * K + slots, mask=slots < K, other=-1)
        same = (row * COLUMNS + columns)[:, None] == cells[None, :]
        found += tl.sum(tl.where(same, slots[None, :] + 1, 0), axis=1)

    down = _wrapped(shift + batch * shift_image, HEIGHT)
    right = _wrapped(shift + batch * shift_image + shift_axis, WIDTH)
    inside = tl.arange(0, BLOCK_P)
    mirrored = tl.load(flip + batch * flip_image)
    across = tl.where(mirrored, P - 1 - inside, inside)
    row = (row + _nearest_cells(down, P)) % ROWS
    jittered_columns = (columns + _nearest_cells(right, P)) % COLUMNS
    y = (row * P + inside + HEIGHT - down) % HEIGHT
    x = (jittered_columns[:, None] * P + across[None, :] + WIDTH - right) % WIDTH

    in_patch = inside < P
    mask = in_patch[:, None, None] & (columns < COLUMNS)[None, :, None] & in_patch[None, None, :]
    slot = (found - 1) * C + channel
    patch = (
        grad
        + batch * stride
        + slot[None, :, None] * (P * P)
        + inside[:, None, None] * P
        + inside[None, None, :]
    )
    pixels = tl.load(patch, mask=mask & (found > 0)[None, :, None], other=0.0)
    plane = images + (batch * C + channel) * (HEIGHT * WIDTH)
    tl.store(plane + y[:, None, None] * WIDTH + x[None, :, :], pixels, mask=mask)


def gather_patches(
    images: Tensor, kept: Tensor, shift: Tensor, flip: Tensor, patch_size: int
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_patches`."""
    channels, height, width = images.shape[1:]
    batch, count = kept.shape
    patches = images.new_empty(batch, count, channels * patch_size**2)
    positions = kept.new_empty(batch, count)
    launch(
        _gather_patches_fwd,
        (count, batch),
        images,
        images,
        kept.contiguous(),
        shift,
        flip,
        patches,
        positions,
        *images.stride(),
        *shift.stride(),
        *flip.stride(),
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK_P=triton.next_power_of_2(patch_size),
        num_warps=2,
    )
    return patches, positions


def gather_patches_backward(
    grad: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    patch_size: int,
    height: int,
    width: int,
) -> Tensor:
    """Gradient [B, C, H, W] of the images; zero in patches that aren't kept."""
    batch, count = kept.shape
    channels = grad.shape[2] // patch_size**2
    images = grad.new_empty(batch, channels, height, width)
    if grad.stride()[1:] != (grad.shape[2], 1):
        grad = grad.contiguous()
    launch(
        _gather_patches_bwd,
        (height // patch_size, channels, batch),
        grad,
        grad,
        kept.contiguous(),
        shift,
        flip,
        images,
        grad.stride(0),
        count,
        *shift.stride(),
        *flip.stride(),
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK_P=triton.next_power_of_2(patch_size),
        BLOCK_COLUMNS=triton.next_power_of_2(width // patch_size),
        BLOCK_K=64,
        num_warps=8,
    )
    return images
