"""batch_norm_matching: BatchNorm in eval mode and the statistics of its input, from one read of x.

Each program stores the mean of its tile and the sum of squares around that mean. A second kernel
joins the tiles of a channel (Chan, Golub and LeVeque, 1983). Its order is fixed, so every run gives
the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

BLOCK = 4096


@triton.jit
def _channel_tile(ELEMENTS, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets into [B, C, PIXELS] of one tile of a channel, and a mask of those that exist."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = (element // PIXELS) * C + tl.program_id(1)
    return plane * PIXELS + element % PIXELS, element < ELEMENTS


@triton.jit
def _scale(running_var, weight, eps):
    """weight / √(running_var + eps) of this program's channel."""
    channel = tl.program_id(1)
    var = tl.load(running_var + channel).to(tl.float32)
    return tl.load(weight + channel).to(tl.float32) * tl.rsqrt(var + eps)


@triton.jit
def _batch_norm_matching_fwd(
    x,  # [B, C, PIXELS]
    running_mean,  # [C]
    running_var,  # [C]
    weight,  # [C]
    bias,  # [C]
    y,  # [B, C, PIXELS]
    means,  # float32 [C, tiles]
    squares,  # float32 [C, tiles], summed around each tile's own mean
    eps,
    ELEMENTS,  # B · PIXELS, of one channel
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(1)
    at, mask = _channel_tile(ELEMENTS, C, PIXELS, BLOCK)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = _scale(running_var, weight, eps)
    mean = tl.load(running_mean + channel).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32) - mean * scale
    tl.store(y + at, values * scale + shift, mask=mask)

    own_mean = tl.sum(values) / tl.sum(mask.to(tl.float32))
    centred = tl.where(mask, values - own_mean, 0.0)
    partial = channel * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + partial, own_mean)
    tl.store(squares + partial, tl.sum(centred * centred))


@triton.jit
def _batch_norm_matching_finish(
    means,  # float32 [C, TILES]
    squares,  # float32 [C, TILES]
    mean,  # float32 [C]
    var,  # float32 [C]
    TILES,
    ELEMENTS,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, TILES, BLOCK):
        tile = start + lane
        size = tl.minimum(ELEMENTS - tile.to(tl.int64) * TILE, TILE).to(tl.float32)
        own = tl.load(means + channel * TILES + tile, mask=tile < TILES, other=0.0)
        total += own * (size / ELEMENTS)
    joint = tl.sum(total)
    # A tile adds Σ (x − joint)² = its own sum of squares + size · (own mean − joint)².
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, TILES, BLOCK):
        tile = start + lane
        valid = tile < TILES
        size = tl.minimum(ELEMENTS - tile.to(tl.int64) * TILE, TILE).to(tl.float32)
        own = tl.load(means + channel * TILES + tile, mask=valid, other=0.0)
        square = tl.load(squares + channel * TILES + tile, mask=valid, other=0.0)
        total += tl.where(valid, square + size * (own - joint) * (own - joint), 0.0)
    tl.store(mean + channel, joint)
    tl.store(var + channel, tl.sum(total) / ELEMENTS)


@triton.jit
def _batch_norm_matching_bwd(
    grad,  # [B, C, PIXELS]
    x,  # [B, C, PIXELS]
    running_var,  # [C]
    weight,  # [C]
    offset,  # float32 [C]
    slope,  # float32 [C]
    dx,  # [B, C, PIXELS]
    eps,
    ELEMENTS,  # B · PIXELS, of one channel
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(1)
    at, mask = _channel_tile(ELEMENTS, C, PIXELS, BLOCK)
    dy = tl.load(grad + at, mask=mask).to(tl.float32)
    values = tl.load(x + at, mask=mask).to(tl.float32)
    # dx = dy · w / √(running_var + eps) + offset_c + slope_c · x
    scale = _scale(running_var, weight, eps)
    gradient = dy * scale + tl.load(offset + channel) + tl.load(slope + channel) * values
    tl.store(dx + at, gradient, mask=mask)


def batch_norm_matching(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`smi_fast.ops.reference.batch_norm_matching`."""
    batch, channels, height, width = x.shape
    elements = batch * height * width
    tiles = triton.cdiv(elements, BLOCK)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    means, squares = x.new_empty(2, channels, tiles, dtype=torch.float32)
    mean, var = x.new_empty(2, channels, dtype=torch.float32)
    launch(
        _batch_norm_matching_fwd,
        (tiles, channels),
        x,
        x.contiguous(),
        running_mean.contiguous(),
        running_var.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        y,
        means,
        squares,
        eps,
        elements,
        C=channels,
        PIXELS=height * width,
        BLOCK=BLOCK,
        num_warps=8,
    )
    launch(
        _batch_norm_matching_finish,
        (channels,),
        x,
        means,
        squares,
        mean,
        var,
        tiles,
        elements,
        TILE=BLOCK,
        BLOCK=256,
        num_warps=4,
    )
    return y, mean, var


def batch_norm_matching_backward(
    grad: Tensor,
    x: Tensor,
    running_var: Tensor,
    weight: Tensor,
    eps: float,
    offset: Tensor,
    slope: Tensor,
) -> Tensor:
    """See :func:`smi_fast.ops.reference.batch_norm_matching_backward`."""
    batch, channels, height, width = x.shape
    elements = batch * height * width
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(
        _batch_norm_matching_bwd,
        (triton.cdiv(elements, BLOCK), channels),
        x,
        grad.contiguous(),
        x.contiguous(),
        running_var.contiguous(),
        weight.contiguous(),
        offset.contiguous(),
        slope.contiguous(),
        dx,
        eps,
        elements,
        C=channels,
        PIXELS=height * width,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return dx
