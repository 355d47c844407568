"""timm's attention, written out once: the projection to q, k and v, and attention by rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from smi_fast.teacher.rotary import rotate


def project_qkv(attention: Any, y: Tensor, rotation: Tensor | None = None) -> Tensor:
    """q, k and v [B, N, 3, H, D] of tokens y [B, N, width], after their norms and rotation.

    Args:
        attention: of a block.
        y: output of the block's first norm.
        rotation: of patches, see :func:`smi_fast.teacher.rotary.rotations`.
    """
    qkv = _project(attention, y, 0, 3)
    normed = not all(type(n) is nn.Identity for n in (attention.q_norm, attention.k_norm))
    if not normed and rotation is None:
        return qkv
    q, k, v = qkv.unbind(2)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return torch.stack([rotate(attention, q, rotation), rotate(attention, k, rotation), v], dim=2)


def attend_first_rows(
    attention: Any, y: Tensor, rows: int | None = None, rotation: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the first tokens among all tokens y [B, N, width].

    The queries of the other tokens are not computed.

    Args:
        attention: of a block.
        y: output of the block's first norm.
        rows: R; None for all N.
        rotation: of patches, as in :func:`project_qkv`.

    Returns:
        the input of the output projection [B, R, H·D], and the probabilities [B, H, R, N].
    """
    probabilities, v = first_row_probabilities(attention, y, rows, rotation, values=True)
    assert v is not None
    return (probabilities @ v).transpose(1, 2).flatten(2), probabilities


def first_row_probabilities(
    attention: Any,
    y: Tensor,
    rows: int | None = None,
    rotation: Tensor | None = None,
    *,
    values: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The probabilities [B, H, R, N] of :func:`attend_first_rows`, and v [B, H, N, D] or None."""
    q = _project(attention, y[:, :rows], 0, 1).squeeze(2)
    k, *v = _project(attention, y, 1, 3 if values else 2).unbind(2)
    q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (rotate(attention, x, rotation).transpose(1, 2) for x in (q, k))
    scores: Tensor = q * q.shape[-1] ** -0.5 @ k.mT
    return scores.softmax(dim=-1), v[0].transpose(1, 2) if v else None


def _project(attention: Any, y: Tensor, first: int, end: int) -> Tensor:
    """Some of q, k and v, numbered 0 to 2, before their norms: [B, N, end - first, H, D]."""
    heads = attention.num_heads
    if attention.qkv is None:
        # Eva may have three layers, and groups of heads that share k and v.
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)[first:end]
        parts = [layer(y).unflatten(2, (-1, attention.head_dim)) for layer in layers]
        parts = [part.repeat_interleave(heads // part.shape[2], dim=2) for part in parts]
        return torch.stack(parts, dim=2)
    weight, bias = attention.qkv.weight, _qkv_bias(attention)
    rows = slice(first * (len(weight) // 3), end * (len(weight) // 3))
    projected = F.linear(y, weight[rows], None if bias is None else bias[rows])
    chosen: Tensor = projected.unflatten(2, (end - first, heads, -1))
    return chosen


def _qkv_bias(attention: Any) -> Tensor | None:
    """The bias of q, k and v together, which Eva may keep outside of their layer."""
    if getattr(attention, "q_bias", None) is not None:
        return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    bias: Tensor | None = attention.qkv.bias
    return bias


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
