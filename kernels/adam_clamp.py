"""adam_clamp_: one step of Adam and a clamp, in one pass over all pixels or the active patches."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

BLOCK = 1024
ADAM_EPS = 1e-8


@triton.jit
def _one_minus_power(log_beta, step):
    """1 − beta^step. Where beta^step is near 1 a series avoids the cancellation."""
    x = log_beta * step
    series = 0.0
    for k in tl.static_range(9, 0, -1):
        series = (1.0 + series) * x / k
    return tl.where(x > -0.5, -series, 1.0 - tl.exp(x))


@triton.jit
def _adam_clamp(
    images,  # [B, C, HEIGHT, WIDTH], changed
    grad,  # [B, C, HEIGHT, WIDTH]
    exp_avg,  # [B, C, HEIGHT, WIDTH], changed
    exp_avg_sq,  # [B, C, HEIGHT, WIDTH], changed
    low,  # [C]
    high,  # [C]
    active,  # int64 [B, K], or None for every tile
    step,  # int64 []
    lr,  # float64 []
    log_beta1,
    log_beta2,
    decay1,  # 1 - beta1
    beta2,
    decay2,  # 1 - beta2
    weight_decay,
    EPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    COLUMNS: tl.constexpr = (WIDTH + TILE_X - 1) // TILE_X
    tile = tl.program_id(0)
    channel = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if active is not None:
        tile = tl.load(active + batch * tl.num_programs(0) + tile).to(tl.int32)
    inside_y = tl.arange(0, BLOCK_Y)
    inside_x = tl.arange(0, BLOCK_X)
    x = tile % COLUMNS * TILE_X + inside_x
    mask = (inside_y < TILE_Y)[:, None] & ((inside_x < TILE_X) & (x < WIDTH))[None, :]
    plane = (batch * tl.num_programs(1) + channel) * (HEIGHT * WIDTH)
    at = plane + (tile // COLUMNS * TILE_Y + inside_y)[:, None] * WIDTH + x[None, :]

    taken = tl.load(step).to(tl.float32)
    eta = tl.load(lr).to(tl.float32)
    rate = eta / _one_minus_power(log_beta1, taken)
    root_scale = tl.rsqrt(_one_minus_power(log_beta2, taken))
    g = tl.load(grad + at, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=mask).to(tl.float32)
    pixels = tl.load(images + at, mask=mask).to(tl.float32)
    m += (g - m) * decay1
    v = v * beta2 + g * g * decay2
    pixels = pixels * (1.0 - eta * weight_decay) - rate * (m / (tl.sqrt(v) * root_scale + EPS))
    # Unlike tl.maximum and tl.minimum, comparisons pass a NaN on.
    lowest = tl.load(low + channel).to(tl.float32)
    highest = tl.load(high + channel).to(tl.float32)
    pixels = tl.where(pixels < lowest, lowest, pixels)
    pixels = tl.where(pixels > highest, highest, pixels)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    tl.store(images + at, pixels, mask=mask)


def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    low: Tensor,
    high: Tensor,
    active: Tensor | None,
    patch_size: int,
) -> None:
    """See :func:`smi_fast.ops.adam_clamp_`."""
    batch, channels, height, width = images.shape
    if active is None:
        # Each plane [H, W] is treated as one row of H·W pixels, and cut into tiles.
        height, width, tile_y, tile_x = 1, height * width, 1, BLOCK
        tiles = triton.cdiv(width, BLOCK)
    else:
        tile_y = tile_x = patch_size
        tiles = active.shape[1]
    changed = (images, exp_avg, exp_avg_sq)
    pixels, m, v = (tensor.contiguous() for tensor in changed)
    launch(
        _adam_clamp,
        (tiles, channels, batch),
        images,
        pixels,
        grad.contiguous(),
        m,
        v,
        low.contiguous(),
        high.contiguous(),
        None if active is None else active.contiguous(),
        step,
        lr,
        *(math.log(beta) if beta else -math.inf for beta in (beta1, beta2)),
        1 - beta1,
        beta2,
        1 - beta2,
        weight_decay,
        EPS=ADAM_EPS,
        HEIGHT=height,
        WIDTH=width,
        TILE_Y=tile_y,
        TILE_X=tile_x,
        BLOCK_Y=triton.next_power_of_2(tile_y),
        BLOCK_X=triton.next_power_of_2(tile_x),
        num_warps=4 if active is None else 2,
    )
    for tensor, result in zip(changed, (pixels, m, v), strict=True):
        if result is not tensor:
            tensor.copy_(result)
