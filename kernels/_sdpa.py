"""Attention for sets of tokens that one program can't hold: PyTorch's own fused kernels take over.

They tile the keys, which is what pays once scores no longer fit in registers; what the fused op
saves, a gather and a permutation, is small there beside the products themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _rows(qkv: Tensor, kept: Tensor | None) -> Tensor:
    """The kept rows of [B, N, 3, H, D] as [3, B, H, K, D]."""
    if kept is not None:
        qkv = qkv.gather(1, kept[:, :, None, None, None].expand(-1, -1, *qkv.shape[2:]))
    return qkv.permute(2, 0, 3, 1, 4)


def _valid(count: int, lengths: Tensor) -> Tensor:
    return torch.arange(count, device=lengths.device) < lengths[:, None]


def _attend(qkv: Tensor, kept: Tensor | None, lengths: Tensor | None) -> Tensor:
    q, k, v = _rows(qkv, kept)
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    valid = _valid(k.shape[2], lengths)
    # An image without any token attends to its first key, so that no softmax is nan; masked below.
    mask = valid | (torch.arange(k.shape[2], device=k.device) == 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return out.transpose(1, 2).flatten(2).masked_fill(~valid[:, :, None], 0.0)


def attention(
    qkv: Tensor, kept: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_attention`."""
    out = _attend(qkv, kept, lengths)
    if not importance:
        return out, qkv.new_empty(len(qkv), 0)
    q, k, _ = _rows(qkv, kept)
    scores = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))[:, :, 0]
    if lengths is None:
        return out, scores.softmax(-1).mean(1)
    valid = _valid(k.shape[2], lengths)[:, None]
    row = scores.masked_fill(~valid, -torch.inf).softmax(-1)
    return out, row.masked_fill(~valid, 0.0).mean(1)


def attention_backward(
    grad: Tensor, qkv: Tensor, kept: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient [B, N, 3, H, D] of ``qkv``; the forward pass is computed again."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_attend(leaf, kept, lengths), leaf, grad)
    return gradient.contiguous()
