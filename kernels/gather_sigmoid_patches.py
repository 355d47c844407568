"""gather_sigmoid_patches: sigmoid, normalisation, frozen patches and windows in one pass.

The windows are those of gather_patches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .gather_patches import _nearest_cells, _wrapped


@triton.jit
def _gather_sigmoid_patches_fwd(
    field,  # [B, C, H, W], any strides
    kept,  # int64 [B, K]
    shift,  # int64 [B, 2], any strides
    flip,  # bool [B], any stride
    mean,  # [C]
    std,  # [C]
    background,  # [B, C, H, W], with WITH_FROZEN
    frozen,  # bool [B, H // P, W // P], with WITH_FROZEN
    patches,  # [B, K, C * P * P]
    positions,  # int64 [B, K]
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    shift_image,
    shift_axis,
    flip_image,
    WITH_FROZEN: tl.constexpr,
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
    window = field + batch * stride_b + y[:, None] * stride_y + x[None, :] * stride_x
    patch = patches + slot * (C * P * P) + inside[:, None] * P + inside[None, :]
    still = tl.zeros([BLOCK_P, BLOCK_P], tl.int1)
    if WITH_FROZEN:
        cells = frozen + batch * (ROWS * COLUMNS) + (y // P)[:, None] * COLUMNS + (x // P)[None, :]
        still = tl.load(cells, mask=mask, other=0) != 0
        old = background + batch * (C * HEIGHT * WIDTH) + y[:, None] * WIDTH + x[None, :]
    for c in tl.static_range(C):
        u = tl.load(window + c * stride_c, mask=mask & ~still, other=0.0).to(tl.float32)
        average, deviation = tl.load(mean + c).to(tl.float32), tl.load(std + c).to(tl.float32)
        pixels = (tl.sigmoid(u) - average) / deviation
        if WITH_FROZEN:
            unchanged = tl.load(old + c * (HEIGHT * WIDTH), mask=mask & still, other=0.0)
            pixels = tl.where(still, unchanged.to(tl.float32), pixels)
        tl.store(patch + c * (P * P), pixels, mask=mask)


@triton.jit
def _gather_sigmoid_patches_bwd(
    grad,  # [B, K, C * P * P]
    field,  # [B, C, H, W], any strides
    kept,  # int64 [B, K]
    shift,  # int64 [B, 2], any strides
    flip,  # bool [B], any stride
    std,  # [C]
    frozen,  # bool [B, H // P, W // P], with WITH_FROZEN
    result,  # [B, C, H, W]
    K,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    shift_image,
    shift_axis,
    flip_image,
    WITH_FROZEN: tl.constexpr,
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
    y = ((row * P + inside + HEIGHT - down) % HEIGHT)[:, None, None]
    x = ((jittered_columns[:, None] * P + across[None, :] + WIDTH - right) % WIDTH)[None, :, :]

    in_patch = inside < P
    mask = in_patch[:, None, None] & (columns < COLUMNS)[None, :, None] & in_patch[None, None, :]
    wanted = mask & (found > 0)[None, :, None]
    moves = wanted
    if WITH_FROZEN:
        cells = frozen + batch * (ROWS * COLUMNS) + (y // P) * COLUMNS + x // P
        moves = moves & (tl.load(cells, mask=moves, other=0) == 0)
    slot = (batch * K + found - 1) * C + channel
    patch = grad + slot[None, :, None] * (P * P) + inside[:, None, None] * P + inside[None, None, :]
    # Frozen pixels are loaded, too: a mask of single pixels would forbid loads of 16 bytes.
    of_pixels = tl.load(patch, mask=wanted, other=0.0).to(tl.float32)
    window = (
        field + batch * stride_b + channel.to(tl.int64) * stride_c + y * stride_y + x * stride_x
    )
    u = tl.load(window, mask=moves, other=0.0).to(tl.float32)
    # The sigmoid's slope is e / (1 + e)² with e = exp(-|u|), which never overflows.
    e = tl.exp(-tl.abs(u))
    deviation = tl.load(std + channel).to(tl.float32)
    slopes = of_pixels * e / ((1 + e) * (1 + e) * deviation)
    plane = result + (batch * C + channel) * (HEIGHT * WIDTH)
    tl.store(plane + y * WIDTH + x, tl.where(moves, slopes, 0.0), mask=mask)


def gather_sigmoid_patches(
    field: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    mean: Tensor,
    std: Tensor,
    background: Tensor | None,
    frozen: Tensor | None,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_sigmoid_patches`."""
    channels, height, width = field.shape[1:]
    batch, count = kept.shape
    patches = field.new_empty(batch, count, channels * patch_size**2)
    positions = kept.new_empty(batch, count)
    launch(
        _gather_sigmoid_patches_fwd,
        (count, batch),
        field,
        field,
        kept.contiguous(),
        shift,
        flip,
        mean.contiguous(),
        std.contiguous(),
        field if background is None else background.contiguous(),
        flip if frozen is None else frozen.contiguous(),
        patches,
        positions,
        *field.stride(),
        *shift.stride(),
        *flip.stride(),
        WITH_FROZEN=frozen is not None,
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK_P=triton.next_power_of_2(patch_size),
        num_warps=2,
    )
    return patches, positions


def gather_sigmoid_patches_backward(
    grad: Tensor,
    field: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    std: Tensor,
    frozen: Tensor | None,
    patch_size: int,
) -> Tensor:
    """Gradient [B, C, H, W] of the field; zero in frozen patches and in those that aren't kept."""
    batch, channels, height, width = field.shape
    result = field.new_empty(field.shape)
    launch(
        _gather_sigmoid_patches_bwd,
        (height // patch_size, channels, batch),
        grad,
        grad.contiguous(),
        field,
        kept.contiguous(),
        shift,
        flip,
        std.contiguous(),
        flip if frozen is None else frozen.contiguous(),
        result,
        kept.shape[1],
        *field.stride(),
        *shift.stride(),
        *flip.stride(),
        WITH_FROZEN=frozen is not None,
        C=channels,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        BLOCK_P=triton.next_power_of_2(patch_size),
        BLOCK_COLUMNS=triton.next_power_of_2(width // patch_size),
        BLOCK_K=64,
        num_warps=8,
    )
    return result
