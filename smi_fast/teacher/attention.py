"""timm's attention, written out once: the projection to q, k and v, and attention by rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


def project_qkv(attention: Attention, y: Tensor) -> Tensor:
    """q, k and v [B, N, 3, H, D] of tokens y [B, N, width], after their norms."""
    qkv: Tensor = attention.qkv(y).unflatten(2, (3, attention.num_heads, -1))
    if isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity):
        return qkv
    q, k, v = qkv.unbind(2)
    return torch.stack([attention.q_norm(q), attention.k_norm(k), v], dim=2)


def attend_first_rows(
    attention: Attention, y: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the first tokens among all tokens y [B, N, width].

    The queries of the other tokens are not computed.

    Args:
        attention: of a block.
        y: output of the block's first norm.
        rows: R; None for all N.

    Returns:
        the input of the output projection [B, R, H·D], and the probabilities [B, H, R, N].
    """
    probabilities, v = first_row_probabilities(attention, y, rows, values=True)
    assert v is not None
    return (probabilities @ v).transpose(1, 2).flatten(2), probabilities


def first_row_probabilities(
    attention: Attention, y: Tensor, rows: int | None = None, *, values: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The probabilities [B, H, R, N] of :func:`attend_first_rows`, and v [B, H, N, D] or None."""
    q = _project(attention, y[:, :rows], 0, 1).squeeze(2)
    k, *v = _project(attention, y, 1, 3 if values else 2).unbind(2)
    q, k = attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2)
    scores: Tensor = q * q.shape[-1] ** -0.5 @ k.mT
    return scores.softmax(dim=-1), v[0].transpose(1, 2) if v else None


def _project(attention: Attention, y: Tensor, first: int, end: int) -> Tensor:
    """Some of q, k and v, numbered 0 to 2, before their norms: [B, N, end - first, H, D]."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    rows = slice(first * (len(weight) // 3), end * (len(weight) // 3))
    projected = F.linear(y, weight[rows], None if bias is None else bias[rows])
    chosen: Tensor = projected.unflatten(2, (end - first, attention.num_heads, -1))
    return chosen


@torch.no_grad()
def pool_importance(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """Attention of map pooling's latent query to each of the tokens [B, K, width].

    Returns:
        [B, K], the mean over heads and latents.
    """
    q = pool.q(pool.latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    k = pool.kv(tokens).unflatten(2, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)
    scores: Tensor = (pool.q_norm(q) * pool.scale) @ pool.k_norm(k).mT
    return scores.softmax(dim=-1).mean(dim=(1, 2))
