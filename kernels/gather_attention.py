"""gather_attention: one program computes one head of one image.

- There are few tokens, so a program holds K and V as a whole. A row of scores is complete at once,
  and its softmax is exact in one pass.
- Backward computes the probabilities P again instead of reading saved statistics.
- Each output row belongs to one program. So there are no atomic additions, and every run gives the
  same bytes.
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
def _token_rows(token_index, batch, tokens, K, valid):
    """The rows of qkv that hold some tokens, as int64 so that offsets can't overflow."""
    rows = tokens.to(tl.int64)
    if token_index is not None:
        rows = tl.load(token_index + batch * K + tokens, mask=valid, other=0)
    return rows


@triton.jit
def _gather_attention_fwd(
    qkv,  # [B, N, 3, H, D], any strides
    token_index,  # int64 [B, K], or None
    lengths,  # int64 [B], or None
    out,  # [B, K, H, D]
    first_probabilities,  # float32 [B, H, K], or None
    scale,
    stride_b,
    stride_n,
    stride_qkv,
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
    key_rows = _token_rows(token_index, batch, keys, K, valid)
    key_at = key_rows[:, None] * stride_n + channels[None, :] * stride_d
    k = tl.load(qkv + stride_qkv + key_at, mask=valid[:, None] & real, other=0.0)

    # The first row comes before tl.dot: after it, K would lie in registers a second time.
    if first_probabilities is not None:
        first = tl.zeros([1], tl.int32)
        first_row = _token_rows(token_index, batch, first, K, first < length)
        first_at = first_row[:, None] * stride_n + channels[None, :] * stride_d
        first_q = tl.load(qkv + first_at, mask=(first < length)[:, None] & real, other=0.0)
        first_scores = tl.sum(first_q.to(tl.float32) * k.to(tl.float32), 1) * (scale * LOG2_E)
        first_scores = tl.where(valid, first_scores, -float("inf"))
        first_weights = tl.exp2(first_scores - tl.max(first_scores, 0))
        row = tl.where(valid, first_weights / tl.sum(first_weights, 0), 0.0)
        tl.store(first_probabilities + tl.program_id(0).to(tl.int64) * K + keys, row, mask=keys < K)

    v = tl.load(qkv + 2 * stride_qkv + key_at, mask=valid[:, None] & real, other=0.0)

    for start in range(0, K, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        exists = tokens < length
        rows = _token_rows(token_index, batch, tokens, K, exists)
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
    token_index,  # int64 [B, K], or None
    lengths,  # int64 [B], or None
    dqkv,  # [B, N, 3, H, D], filled with zeros when token_index is given
    scale,
    N,
    stride_b,
    stride_n,
    stride_qkv,
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
    # With token_index the rows after the length stay unwritten: they are zero already, and their
    # index may repeat that of an earlier token.
    written = K if token_index is None else length
    qkv += batch * stride_b + head.to(tl.int64) * stride_h
    grad += (batch * K * H + head) * D
    dqkv += (batch * N * 3 * H + head) * D

    keys = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    valid = keys < length
    real = (channels < D)[None, :]
    key_rows = _token_rows(token_index, batch, keys, K, valid)
    key_at = key_rows[:, None] * stride_n + channels[None, :] * stride_d
    k = tl.load(qkv + stride_qkv + key_at, mask=valid[:, None] & real, other=0.0)
    v = tl.load(qkv + 2 * stride_qkv + key_at, mask=valid[:, None] & real, other=0.0)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    for start in range(0, K, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        exists = tokens < length
        rows = _token_rows(token_index, batch, tokens, K, exists)
        at = rows[:, None] * stride_n + channels[None, :] * stride_d
        q = tl.load(qkv + at, mask=exists[:, None] & real, other=0.0)
        do = tl.load(
            grad + tokens[:, None] * (H * D) + channels[None, :],
            mask=exists[:, None] & real,
            other=0.0,
        )
        # The scores are transposed, keys along the rows: dK and dV then take P and dS as they lie.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        # The fill value is finite, so that an image without tokens gives zeros instead of NaN.
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


# Largest padded tiles of keys, in elements, that the registers of one program hold without spills;
# the compilation tests check it. HALF is for float16 and bfloat16, FULL for float32.
# - Registers hold the operands of tl.dot in forward, and the accumulators dK and dV in backward.
# - Tensor cores have no exact float32 product, so float32 operands lie in registers too.
# - FULL_BWD: dQ = dS K needs all of K in registers. A tile of 128 x 64 spills 50 to 440
#   instructions with 8 or 16 warps. A launch each for dQ, dK and dV would compute P three times.
# - FULL_FWD_GATHERED: with token_index a tile of 256 x 64 spills 4 instructions on sm_90.
HALF_FWD, HALF_BWD, HALF_BWD_AT_ONCE = 256 * 128, 256 * 64, 128 * 64
FULL_FWD, FULL_FWD_GATHERED, FULL_BWD = 256 * 64, 128 * 64, 64 * 64
MOST_TOKENS = 256
BLOCK_M = 16


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; without limit in Triton's interpreter."""
    if device.type != "cuda":
        return 2**31
    properties: Any = torch.cuda.get_device_properties(device)  # typed without this attribute
    return int(properties.shared_memory_per_block_optin)


def _padded(size: int) -> int:
    """The side of a tile: the next power of two, at least the 16 that ``tl.dot`` requires."""
    return max(16, int(triton.next_power_of_2(size)))


def fits(qkv: Tensor, token_index: Tensor | None, *, backward: bool) -> bool:
    """Whether one program can hold the tokens of a head; :mod:`._sdpa` computes larger sizes."""
    count, width = (qkv if token_index is None else token_index).shape[1], qkv.shape[4]
    full_fwd = FULL_FWD if token_index is None else FULL_FWD_GATHERED
    full = qkv.dtype == torch.float32
    registers = (full_fwd, FULL_BWD)[backward] if full else (HALF_FWD, HALF_BWD)[backward]
    keys, channels = _padded(count), _padded(width)
    # Shared memory holds K and V, in backward K twice (again as an operand of dQ), and one block
    # of P and of Q.
    elements = (3 if backward else 2) * keys * channels + BLOCK_M * (keys + channels)
    return (
        keys <= MOST_TOKENS
        and keys * channels <= registers
        and elements * qkv.element_size() <= shared_memory(qkv.device)
    )


def _blocks(count: int, width: int, dtype: torch.dtype, *, backward: bool) -> dict[str, Any]:
    """Constexprs and launch options for K = ``count`` tokens and heads of D = ``width``."""
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
    qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_attention`; without ``importance`` the second is [B, 0]."""
    batch, count, _, heads, width = qkv.shape
    count = count if token_index is None else token_index.shape[1]
    if not fits(qkv, token_index, backward=False):
        return _sdpa.attention(qkv, token_index, lengths, importance)
    out = qkv.new_empty(batch, count, heads * width)
    rows = qkv.new_empty(batch, heads, count, dtype=torch.float32) if importance else None
    launch(
        _gather_attention_fwd,
        (batch * heads,),
        qkv,
        qkv,
        None if token_index is None else token_index.contiguous(),
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
    grad: Tensor, qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient [B, N, 3, H, D] of ``qkv``; rows outside of ``token_index`` get zero."""
    batch, tokens, _, heads, width = qkv.shape
    count = tokens if token_index is None else token_index.shape[1]
    if not fits(qkv, token_index, backward=True):
        return _sdpa.attention_backward(grad, qkv, token_index, lengths)
    make = torch.empty_like if token_index is None else torch.zeros_like
    gradient = make(qkv, memory_format=torch.contiguous_format)
    blocks = _blocks(count, width, qkv.dtype, backward=True)
    # The registers hold dK and dV together only for small tiles; larger ones take two launches.
    at_once = blocks["BLOCK_K"] * blocks["BLOCK_D"] <= HALF_BWD_AT_ONCE
    for with_qk, with_v in ((True, True),) if at_once else ((True, False), (False, True)):
        launch(
            _gather_attention_bwd,
            (batch * heads,),
            qkv,
            grad.contiguous(),
            qkv,
            None if token_index is None else token_index.contiguous(),
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
