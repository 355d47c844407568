"""What a block's attention makes of its input: q, k and v of each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


def qkv_of(attention: Attention, y: Tensor) -> Tensor:
    """q, k and v [B, N, 3, H, D] of tokens y, with the norms of q and k where there are any."""
    qkv: Tensor = attention.qkv(y).unflatten(2, (3, attention.num_heads, -1))
    if isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity):
        return qkv
    q, k, v = qkv.unbind(2)
    return torch.stack([attention.q_norm(q), attention.k_norm(k), v], dim=2)


def parts_of(attention: Attention, y: Tensor, first: int, end: int) -> Tensor:
    """Of q, k and v, the parts 0, 1 and 2, those from ``first`` up to ``end``, before their norms.

    [B, N, end - first, H, D]; no other is computed.
    """
    weight, bias = attention.qkv.weight, attention.qkv.bias
    rows = slice(first * (len(weight) // 3), end * (len(weight) // 3))
    projected = F.linear(y, weight[rows], None if bias is None else bias[rows])
    parts: Tensor = projected.unflatten(2, (end - first, attention.num_heads, -1))
    return parts
