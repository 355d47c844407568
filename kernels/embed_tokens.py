"""Tokens in front of the first block, of patches that a product has projected."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .engine_steps import TILE


@triton.jit
def _embed_tokens(
    projected,  # [B, K, D]
    bias,  # [D], or None
    prefix,  # [P, D]
    at,  # [P, D], the embedding of the prefix's positions, or None
    table,  # [N, D], or None
    positions,  # int64 [B, K]
    tokens,  # [B, P + K, D]
    ROWS,
    K,
    P,
    N,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    real = (column < D)[None, :]
    place = row % (P + K)
    slot = row // (P + K) * K + place - P
    in_prefix = (row < ROWS) & (place < P)
    of_patch = (row < ROWS) & (place >= P)
    patch_mask = of_patch[:, None] & real
    x = tl.load(projected + slot[:, None] * D + column[None, :], mask=patch_mask, other=0.0)
    x = x.to(tl.float32)
    if bias is not None:
        constant = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
        x += tl.where(of_patch[:, None], constant[None, :], 0.0)
    if table is not None:
        position = tl.load(positions + slot, mask=of_patch, other=0)
        exists = (position >= 0) & (position < N)
        of_table = position[:, None] * D + column[None, :]
        x += tl.load(table + of_table, mask=patch_mask & exists[:, None], other=0.0)
        # A position that doesn't exist gives NaN, which a check of the loss finds.
        x = tl.where((of_patch & ~exists)[:, None], float("nan"), x)
    prefix_at = place[:, None] * D + column[None, :]
    prefix_mask = in_prefix[:, None] & real
    x += tl.load(prefix + prefix_at, mask=prefix_mask, other=0.0)
    if at is not None:
        x += tl.load(at + prefix_at, mask=prefix_mask, other=0.0)
    tl.store(tokens + row[:, None] * D + column[None, :], x, mask=(row < ROWS)[:, None] & real)


def embed_tokens(
    projected: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    at: Tensor | None,
    table: Tensor | None,
    positions: Tensor,
) -> Tensor:
    """See :func:`smi_fast.engine.iteration_reference.embed_tokens`."""
    batch, kept, width = projected.shape
    count = prefix.shape[1]
    tokens = projected.new_empty(batch, count + kept, width)
    rows, padded = batch * (count + kept), triton.next_power_of_2(width)
    block_rows = max(1, TILE // padded)
    constants = {"D": width, "BLOCK_ROWS": block_rows, "BLOCK_D": padded, "num_warps": 4}
    weights = bias, prefix.contiguous(), at, table
    sizes = rows, kept, count, 0 if table is None else len(table)
    launch(
        *(_embed_tokens, (triton.cdiv(rows, block_rows),), projected, projected.contiguous()),
        *(*weights, positions.contiguous(), tokens, *sizes),
        **constants,
    )
    return tokens
