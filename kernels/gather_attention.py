"""gather_attention: one program owns one head of one image.

The kept sets are short, so K and V stay with the program and a row of scores is complete at once:
its softmax is exact in one pass, and backward computes P again instead of reading saved statistics.
No two programs share an output row, so nothing is added atomically and no run differs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _sdpa
from ._launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _token_rows(kept, batch, tokens, K, valid):
    """Which rows of qkv some tokens are, int64 so that offsets can't overflow."""
    rows = tokens.to(tl.int64)
    if kept is not None:
        rows = tl.load(kept + batch * K + tokens, mask=valid, other=0)
    return rows


@triton.jit
def _gather_attention_fwd(
    qkv,  # [B, N, 3, H, D], any strides
    kept,  # int64 [B, K], or None
    lengths,  # int64 [B], or None
    out,  # [B, K, H, D]
    first_rows,  # float32 [B, H, K], or None
    scale,
    stride_b,
    stride_n,
    stride_part,
    stride_h,
    stride_d,
    K,
    H,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    length = K
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch), K).to(tl.int32)
    qkv += batch * stride_b + head.to(tl.int64) * stride_h
    out += (batch * K * H + head) * D

    keys = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    valid = keys < length
    real = (channels < D)[None, :]
    key_rows = _token_rows(kept, batch, keys, K, valid)
    key_at = key_rows[:, None] * stride_n + channels[None, :] * stride_d
    k = tl.load(qkv + stride_part + key_at, mask=valid[:, None] & real, other=0.0)

    # Before the products: after them, K would lie in registers a second time.
    if first_rows is not None:
        first = tl.zeros([1], tl.int32)
        first_row = _token_rows(kept, batch, first, K, first < length)
        first_at = first_row[:, None] * stride_n + channels[None, :] * stride_d
        first_q = tl.load(qkv + first_at, mask=(first < length)[:, None] & real, other=0.0)
        first_scores = tl.sum(first_q.to(tl.float32) * k.to(tl.float32), 1) * (scale * LOG2_E)
        first_scores = tl.where(valid, first_scores, -float("inf"))
        first_weights = tl.exp2(first_scores - tl.max(first_scores, 0))
        row = tl.where(valid, first_weights / tl.sum(first_weights, 0), 0.0)
        tl.store(first_rows + tl.program_id(0).to(tl.int64) * K + keys, row, mask=keys < K)

    v = tl.load(qkv + 2 * stride_part + key_at, mask=valid[:, None] & real, other=0.0)

    for start in range(0, K, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        exists = tokens < length
        rows = _token_rows(kept, batch, tokens, K, exists)
        at = rows[:, None] * stride_n + channels[None, :] * stride_d
        q = tl.load(qkv + at, mask=exists[:, None] & real, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(valid[None, :], scores, -float("inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        result /= tl.sum(weights, 1)[:, None]
        tl.store(
            out + tokens[:, None] * (H * D) + channels[None, :],
            tl.where(exists[:, None], result, 0.0),
            mask=(tokens < K)[:, None] & real,
        )


@triton.jit
def _gather_attention_bwd(
    grad,  # [B, K, H, D]
    qkv,  # [B, N, 3, H, D], any strides
    kept,  # int64 [B, K], or None
    lengths,  # int64 [B], or None
    dqkv,  # [B, N, 3, H, D], zero where kept is given
    scale,
    N,
    stride_b,
    stride_n,
    stride_part,
    stride_h,
    stride_d,
    K,
    H,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_QK: tl.constexpr,
    WITH_V: tl.constexpr,
):
    batch = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    length = K
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch), K).to(tl.int32)
    # Rows after the length are zero already where kept is given, and may repeat a row that isn't.
    written = K if kept is None else length
    qkv += batch * stride_b + head.to(tl.int64) * stride_h
    grad += (batch * K * H + head) * D
    dqkv += (batch * N * 3 * H + head) * D

    keys = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    valid = keys < length
    real = (channels < D)[None, :]
    key_rows = _token_rows(kept, batch, keys, K, valid)
    key_at = key_rows[:, None] * stride_n + channels[None, :] * stride_d
    k = tl.load(qkv + stride_part + key_at, mask=valid[:, None] & real, other=0.0)
    v = tl.load(qkv + 2 * stride_part + key_at, mask=valid[:, None] & real, other=0.0)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    for start in range(0, K, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        exists = tokens < length
        rows = _token_rows(kept, batch, tokens, K, exists)
        at = rows[:, None] * stride_n + channels[None, :] * stride_d
        q = tl.load(qkv + at, mask=exists[:, None] & real, other=0.0)
        do = tl.load(
            grad + tokens[:, None] * (H * D) + channels[None, :],
            mask=exists[:, None] & real,
            other=0.0,
        )
        # Transposed, with keys along the rows: P and dS are where the sums over tokens need them.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        # Not infinite, so that an image without any token gives zeros and no nan.
        scores = tl.where(valid[:, None], scores, -1e38)
        weights = tl.exp2(scores - tl.max(scores, 0)[None, :])
        p = weights / tl.sum(weights, 0)[None, :]
        if WITH_V:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)  # dV = Pᵀ dO
        if WITH_QK:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # dP = dO Vᵀ
            # dS = P ∘ (dP − rowsum(P ∘ dP))
            ds = (p * (dp - tl.sum(p * dp, 0)[None, :]) * scale).to(q.dtype)
            dq = tl.dot(tl.trans(k), ds, input_precision=PRECISION)  # dQ = dS K / √D
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)  # dK = dSᵀ Q / √D
            dq_at = rows[None, :] * (3 * H * D) + channels[:, None]
            tl.store(dqkv + dq_at, dq, mask=(tokens < written)[None, :] & (channels < D)[:, None])

    key_at = key_rows[:, None] * (3 * H * D) + channels[None, :]
    mask = (keys < written)[:, None] & real
    if WITH_QK:
        tl.store(dqkv + H * D + key_at, dk, mask=mask)
    if WITH_V:
        tl.store(dqkv + 2 * H * D + key_at, dv, mask=mask)


# Elements of a padded tile of keys that the registers of one program hold: operands of products in
# forward, the accumulators dK and dV in backward. float32 has no exact tensor-core product, so its
# operands lie in registers too. In backward dQ = dS K then wants all of K there: at 128 x 64 that
# spills 50 to 440 instructions, with 8 or 16 warps; a launch each for dQ, dK and dV would compute
# P three times. A gathered set of 256 x 64 spills 4 instructions in forward on sm_90. Where these
# bounds hold nothing spills, as the compilation tests show.
HALF_FWD, HALF_BWD, HALF_BWD_AT_ONCE = 256 * 128, 256 * 64, 128 * 64
FULL_FWD, FULL_FWD_GATHERED, FULL_BWD = 256 * 64, 128 * 64, 64 * 64
MOST_TOKENS = 256
BLOCK_M = 16


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; interpreted ones have all they want."""
    if device.type != "cuda":
        return 2**31
    properties: Any = torch.cuda.get_device_properties(device)  # typed without this attribute
    return int(properties.shared_memory_per_block_optin)


def _padded(size: int) -> int:
    """A side of a tile: a power of two, and no less than ``tl.dot`` takes."""
    return max(16, int(triton.next_power_of_2(size)))


def _fits(qkv: Tensor, kept: Tensor | None, *, backward: bool) -> bool:
    """Whether one program can hold the tokens of a head; :mod:`._sdpa` takes the others."""
    count, width = (qkv if kept is None else kept).shape[1], qkv.shape[4]
    full_fwd = FULL_FWD if kept is None else FULL_FWD_GATHERED
    full = qkv.dtype == torch.float32
    registers = (full_fwd, FULL_BWD)[backward] if full else (HALF_FWD, HALF_BWD)[backward]
    keys, channels = _padded(count), _padded(width)
    # K and V, in backward K once more as an operand of dQ, and a block each of P and of Q.
    elements = (3 if backward else 2) * keys * channels + BLOCK_M * (keys + channels)
    return (
        keys <= MOST_TOKENS
        and keys * channels <= registers
        and elements * qkv.element_size() <= shared_memory(qkv.device)
    )


def _blocks(count: int, width: int, dtype: torch.dtype, *, backward: bool) -> dict[str, Any]:
    """Constants of a launch."""
    full = dtype == torch.float32
    keys = _padded(count)
    warps = 8 if full or keys > 64 else 4
    if keys > 128 and not backward:
        warps = 16
    return {
        "D": width,
        "BLOCK_M": BLOCK_M,
        "BLOCK_K": keys,
        "BLOCK_D": _padded(width),
        "PRECISION": "ieee" if full else "tf32",
        "num_warps": warps,
        "num_stages": 1,
    }


def gather_attention(
    qkv: Tensor, kept: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_attention`; importance is [B, 0] when it isn't wanted."""
    batch, count, _, heads, width = qkv.shape
    count = count if kept is None else kept.shape[1]
    if not _fits(qkv, kept, backward=False):
        return _sdpa.attention(qkv, kept, lengths, importance)
    out = qkv.new_empty(batch, count, heads * width)
    rows = qkv.new_empty(batch, heads, count, dtype=torch.float32) if importance else None
    launch(
        _gather_attention_fwd,
        (batch * heads,),
        qkv,
        qkv,
        None if kept is None else kept.contiguous(),
        None if lengths is None else lengths.contiguous(),
        out,
        rows,
        width**-0.5,
        *qkv.stride(),
        count,
        heads,
        **_blocks(count, width, qkv.dtype, backward=False),
    )
    if rows is None:
        return out, qkv.new_empty(batch, 0)
    return out, rows.mean(1).to(qkv.dtype)


def gather_attention_backward(
    grad: Tensor, qkv: Tensor, kept: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient [B, N, 3, H, D] of ``qkv``; rows that aren't kept get zero."""
    batch, tokens, _, heads, width = qkv.shape
    count = tokens if kept is None else kept.shape[1]
    if not _fits(qkv, kept, backward=True):
        return _sdpa.attention_backward(grad, qkv, kept, lengths)
    make = torch.empty_like if kept is None else torch.zeros_like
    gradient = make(qkv, memory_format=torch.contiguous_format)
    blocks = _blocks(count, width, qkv.dtype, backward=True)
    # dK and dV of larger sets don't fit in the registers beside each other: one after the other.
    at_once = blocks["BLOCK_K"] * blocks["BLOCK_D"] <= HALF_BWD_AT_ONCE
    for with_qk, with_v in ((True, True),) if at_once else ((True, False), (False, True)):
        launch(
            _gather_attention_bwd,
            (batch * heads,),
            qkv,
            grad.contiguous(),
            qkv,
            None if kept is None else kept.contiguous(),
            None if lengths is None else lengths.contiguous(),
            gradient,
            width**-0.5,
            tokens,
            *qkv.stride(),
            count,
            heads,
            WITH_QK=with_qk,
            WITH_V=with_v,
            **blocks,
        )
    return gradient
