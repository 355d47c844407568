"""The specification of the engine's steps in plain PyTorch, forward and backward.

Each function is what a kernel of the engine must compute, on contiguous tensors that it is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smi_fast.ops.reference import gather_attention, gather_attention_backward


def add_normalize_(
    x: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    eps: float,
    normalized: Tensor,
    rstd: Tensor,
) -> None:
    """LayerNorm without its affine part, of rows x [rows, D] += added + bias.

    Writes normalized [rows, D] and rstd [rows], one over the standard deviation.
    """
    if added is not None and bias is not None:
        x += added + bias
    centred = x - x.mean(dim=1, keepdim=True)
    rstd.copy_((centred.square().mean(dim=1) + eps).rsqrt())
    normalized.copy_(centred * rstd[:, None])


def normalize_backward_(gradient: Tensor, grad: Tensor, normalized: Tensor, rstd: Tensor) -> None:
    """Adds to gradient [rows, D] that of x in :func:`add_normalize_`, with n = normalized.

    dx = rstd (dn − mean(dn) − n mean(dn ∘ n)).
    """
    slope = (grad * normalized).mean(dim=1, keepdim=True)
    gradient += rstd[:, None] * (grad - grad.mean(dim=1, keepdim=True) - normalized * slope)


def gelu_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x + bias) for x [rows, F], which becomes the derivative there: Φ(x) + x φ(x)."""
    x += bias
    cdf = torch.special.ndtr(x)
    out.copy_(x * cdf)
    x.copy_(cdf + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi))


def multiply_(x: Tensor, factors: Tensor) -> None:
    """x *= factors of the same shape."""
    x *= factors


def attend_(qkv: Tensor, q_bias: Tensor, out: Tensor) -> None:
    """Attention of qkv [B, N, 3, H, D] into out, q_bias [H·D] added to the queries."""
    out.copy_(gather_attention(_biased(qkv, q_bias), None, None, False)[0].view_as(out))


def attend_backward_(grad: Tensor, qkv: Tensor, q_bias: Tensor, d_qkv: Tensor) -> None:
    """The gradient of qkv in :func:`attend_` into d_qkv, from that of its out."""
    rows = grad.view(*qkv.shape[:2], q_bias.numel())
    d_qkv.copy_(gather_attention_backward(rows, _biased(qkv, q_bias), None, None).view_as(d_qkv))


def attend_rows(q: Tensor, q_bias: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries q + q_bias [B, R, H·D] among kv [B, N, 2, H, D].

    Returns out [B, R, H·D] and the probabilities [B, H, R, N] of the values in it.
    """
    keys, values = kv.permute(2, 0, 3, 1, 4)
    probabilities = (_queries(q, q_bias, kv) @ keys.mT).softmax(dim=-1)
    return (probabilities @ values).transpose(1, 2).flatten(2), probabilities


def attend_rows_backward(
    grad: Tensor, q: Tensor, q_bias: Tensor, kv: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q and kv in :func:`attend_rows`, from that of its out."""
    keys, values = kv.permute(2, 0, 3, 1, 4)
    d_out = grad.unflatten(2, kv.shape[3:]).transpose(1, 2)
    d_probabilities = d_out @ values.mT
    d_scores = probabilities * (
        d_probabilities - (probabilities * d_probabilities).sum(dim=-1, keepdim=True)
    )
    d_q = (d_scores @ keys).transpose(1, 2).flatten(2) / kv.shape[4] ** 0.5
    d_keys, d_values = d_scores.mT @ _queries(q, q_bias, kv), probabilities.mT @ d_out
    return d_q, torch.stack([d_keys, d_values]).permute(1, 3, 0, 2, 4).contiguous()


def _queries(q: Tensor, q_bias: Tensor, kv: Tensor) -> Tensor:
    """[B, H, R, D], biased and scaled."""
    queries: Tensor = (q + q_bias).unflatten(2, kv.shape[3:]).transpose(1, 2)
    return queries / math.sqrt(kv.shape[4])


def _biased(qkv: Tensor, q_bias: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    return torch.stack([q + q_bias.view(qkv.shape[3:]), k, v], dim=2)
