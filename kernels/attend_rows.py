"""Attention of a few queries among all tokens: the last block of a teacher.

One program computes one head of one image. Tokens come in tiles, so that there may be any number.
They are read again for each query, which costs little: a head has one query, or two, and its tokens
are in the cache by then.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK_N = 64


@triton.jit
def _head(H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The image and head of a program, and the channels of the head."""
    channel = tl.arange(0, BLOCK_D)
    return (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H, channel, channel < D


@triton.jit
def _query(q, q_bias, channel, real, scale):
    """(q + q_bias) · scale, [BLOCK_D]."""
    values = tl.load(q + channel, mask=real, other=0.0).to(tl.float32)
    return (values + tl.load(q_bias + channel, mask=real, other=0.0)) * scale


@triton.jit
def _tokens(kv, start, channel, real, N, stride, BLOCK_N: tl.constexpr):
    """A tile of keys or of values, [BLOCK_N, BLOCK_D]."""
    token = start + tl.arange(0, BLOCK_N)
    at = token.to(tl.int64)[:, None] * stride + channel[None, :]
    mask = (token < N)[:, None] & real[None, :]
    return tl.load(kv + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scores(keys, start, query, channel, real, N, stride, BLOCK_N: tl.constexpr):
    """The scores of one query with a tile of keys, [BLOCK_N]; those past the last are -inf."""
    k = _tokens(keys, start, channel, real, N, stride, BLOCK_N)
    scores = tl.sum(query[None, :] * k, 1)
    return tl.where(start + tl.arange(0, BLOCK_N) < N, scores, -float("inf"))


@triton.jit
def _attend_rows_fwd(
    q,  # [B, R, H, D]
    q_bias,  # float32 [H, D]
    kv,  # [B, N, 2, H, D]
    out,  # [B, R, H, D]
    probabilities,  # float32 [B, H, R, N]
    scale,
    R,
    N,
    H,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch, head, channel, real = _head(H, D, BLOCK_D)
    keys = kv + batch * N * 2 * H * D + head * D
    values = keys + H * D
    probabilities += tl.program_id(0).to(tl.int64) * R * N
    for r in range(R):
        own = (batch * R + r) * H * D + head * D
        query = _query(q + own, q_bias + head * D, channel, real, scale * LOG2_E)
        # The softmax needs the largest score and the sum first: of all tokens before this tile.
        largest = tl.full([1], -float("inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        for start in range(0, N, BLOCK_N):
            scores = _scores(keys, start, query, channel, real, N, 2 * H * D, BLOCK_N)
            larger = tl.maximum(largest, tl.max(scores, 0))
            total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(scores - larger), 0)
            largest = larger
        result = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, N, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            scores = _scores(keys, start, query, channel, real, N, 2 * H * D, BLOCK_N)
            p = tl.exp2(scores - largest) / total
            tl.store(probabilities + r * N + token, p, mask=token < N)
            v = _tokens(values, start, channel, real, N, 2 * H * D, BLOCK_N)
            result += tl.sum(p[:, None] * v, 0)
        tl.store(out + own + channel, result, mask=real)


@triton.jit
def _attend_rows_bwd(
    grad,  # [B, R, H, D]
    q,  # [B, R, H, D]
    q_bias,  # float32 [H, D]
    kv,  # [B, N, 2, H, D]
    probabilities,  # float32 [B, H, R, N]
    d_q,  # [B, R, H, D]
    d_kv,  # [B, N, 2, H, D]
    scale,
    R,
    N,
    H,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    batch, head, channel, real = _head(H, D, BLOCK_D)
    offset = batch * N * 2 * H * D + head * D
    keys, values, d_keys, d_values = kv + offset, kv + offset + H * D, d_kv + offset, d_kv + offset
    d_values += H * D
    probabilities += tl.program_id(0).to(tl.int64) * R * N
    own = batch * R * H * D + head * D
    query = tl.arange(0, BLOCK_R)

    # rowsum(P ∘ dP) of each query, which dS of every token needs.
    sums = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, N, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        v = _tokens(values, start, channel, real, N, 2 * H * D, BLOCK_N)
        for r in range(R):
            do = tl.load(grad + own + r * H * D + channel, mask=real, other=0.0).to(tl.float32)
            p = tl.load(probabilities + r * N + token, mask=token < N, other=0.0)
            row_sum = tl.sum(p * tl.sum(v * do[None, :], 1), 0)
            sums += tl.where(query == r, row_sum, 0.0)

    dq = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        k = _tokens(keys, start, channel, real, N, 2 * H * D, BLOCK_N)
        v = _tokens(values, start, channel, real, N, 2 * H * D, BLOCK_N)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for r in range(R):
            own_q = _query(q + own + r * H * D, q_bias + head * D, channel, real, scale)
            do = tl.load(grad + own + r * H * D + channel, mask=real, other=0.0).to(tl.float32)
            p = tl.load(probabilities + r * N + token, mask=token < N, other=0.0)
            # dS = P ∘ (dP − rowsum(P ∘ dP))
            dp = tl.sum(v * do[None, :], 1)
            ds = p * (dp - tl.sum(tl.where(query == r, sums, 0.0), 0))
            dk += ds[:, None] * own_q[None, :]
            dv += p[:, None] * do[None, :]
            term = tl.sum(ds[:, None] * k, 0) * scale
            dq += tl.where((query == r)[:, None], term[None, :], 0.0)
        at = token.to(tl.int64)[:, None] * (2 * H * D) + channel[None, :]
        mask = (token < N)[:, None] & real[None, :]
        tl.store(d_keys + at, dk, mask=mask)
        tl.store(d_values + at, dv, mask=mask)
    at = own + query[:, None] * (H * D) + channel[None, :]
    tl.store(d_q + at, dq, mask=(query < R)[:, None] & real[None, :])


def _constants(kv: Tensor) -> dict[str, Any]:
    width = kv.shape[4]
    return {
        "D": width,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": triton.next_power_of_2(width),
        "num_warps": 4,
        "num_stages": 1,
    }


def attend_rows(q: Tensor, q_bias: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.engine.reference.attend_rows`.

    q and kv may be half precision, and so is the output then; probabilities are float32.
    """
    batch, rows, _ = q.shape
    _, tokens, _, heads, width = kv.shape
    out = q.new_empty(q.shape)
    probabilities = q.new_empty(batch, heads, rows, tokens, dtype=torch.float32)
    tensors, sizes = (q, q_bias, kv, out, probabilities), (rows, tokens, heads)
    launch(_attend_rows_fwd, (batch * heads,), q, *tensors, width**-0.5, *sizes, **_constants(kv))
    return out, probabilities


def attend_rows_backward(
    grad: Tensor, q: Tensor, q_bias: Tensor, kv: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q and kv, see :func:`smi_fast.engine.reference.attend_rows_backward`."""
    batch, rows, _ = q.shape
    _, tokens, _, heads, width = kv.shape
    d_q, d_kv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    launch(
        _attend_rows_bwd,
        (batch * heads,),
        q,
        *(grad, q, q_bias, kv, probabilities, d_q, d_kv),
        width**-0.5,
        *(rows, tokens, heads),
        **_constants(kv),
        BLOCK_R=triton.next_power_of_2(rows),
    )
    return d_q, d_kv
