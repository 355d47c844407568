"""Attention among more tokens than one Triton program can hold, by PyTorch's fused kernels.

PyTorch's kernels tile the keys, which is faster once the scores no longer fit in registers. The
gather and the permutation before them cost little next to the matrix products of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _rows(qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The rows ``token_index`` of qkv [B, N, 3, H, D], as [3, B, H, K, D].

    Rows past the lengths are 0. A mask of the scores alone would let their NaN through, because a
    probability of 0 times NaN is NaN.
    """
    if token_index is not None:
        qkv = qkv.gather(1, token_index[:, :, None, None, None].expand(-1, -1, *qkv.shape[2:]))
    if lengths is not None:
        qkv = qkv.masked_fill(~_valid(qkv.shape[1], lengths)[:, :, None, None, None], 0.0)
    return qkv.permute(2, 0, 3, 1, 4)


def _valid(count: int, lengths: Tensor) -> Tensor:
    """Mark the first ``lengths`` of K = ``count`` tokens: bool [B, K]."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]


def _attend(qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None) -> Tensor:
    q, k, v = _rows(qkv, token_index, lengths)
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    valid = _valid(k.shape[2], lengths)
    # The softmax of a row without keys is NaN. So an image without tokens attends to its first key,
    # and its output is set to zero below.
    mask = valid | (torch.arange(k.shape[2], device=k.device) == 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return out.transpose(1, 2).flatten(2).masked_fill(~valid[:, :, None], 0.0)


def attention(
    qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_attention`; without ``importance`` the second is [B, 0]."""
    out = _attend(qkv, token_index, lengths)
    if not importance:
        return out, qkv.new_empty(len(qkv), 0)
    q, k, _ = _rows(qkv, token_index, lengths)
    scores = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))[:, :, 0]
    if lengths is None:
        return out, scores.softmax(-1).mean(1)
    valid = _valid(k.shape[2], lengths)[:, None]
    row = scores.masked_fill(~valid, -torch.inf).softmax(-1)
    return out, row.masked_fill(~valid, 0.0).mean(1)


def attention_backward(
    grad: Tensor, qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient [B, N, 3, H, D] of ``qkv``. It computes the forward pass again."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_attend(leaf, token_index, lengths), leaf, grad)
    return gradient.contiguous()
