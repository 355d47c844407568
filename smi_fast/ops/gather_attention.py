"""Self-attention among a set of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.ops._checks import expect, expect_device, expect_index
from smi_fast.ops.backends import AUTO, Backend, choose
from smi_fast.ops.limits import AttentionSize


def gather_attention(
    qkv: Tensor,
    token_index: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    importance: bool = False,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention among kept tokens, from the QKV projection's layout to the output
    projection's.

    With ``rows = qkv if token_index is None else qkv.gather(1, kept…)`` equal to::

        q, k, v = rows.permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.mT / D**0.5).softmax(-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        importance = probabilities[:, :, 0].mean(1)

    :class:`smi_fast.SparseViT` gathers patches as pixels, before they are embedded, and calls this
    without ``token_index``. That argument serves loops that drop tokens inside of the network.

    Args:
        qkv: [B, N, 3, H, D], any strides.
        token_index: int64 [B, K], distinct rows of ``qkv`` to attend among, prefix tokens
            included; None takes all of them in order.
        lengths: int64 [B], how many of the K tokens each image has; later rows of ``out`` are zero.
        importance: also return how much the first token attends to each; it has no gradient.
        backend: see :mod:`smi_fast.ops.backends`.

    Returns:
        out [B, K, H·D], and importance [B, K] or None.

    Raises:
        ValueError: wrong shape, data type or device.
        BackendUnavailable: the backend can't run here.
    """
    expect(qkv.dim() == 5 and qkv.shape[2] == 3, "qkv [B, N, 3, H, D]", qkv)
    if token_index is not None:
        expect_index("token_index", token_index, qkv)
    if lengths is not None:
        fits = lengths.shape == (len(qkv),) and lengths.dtype == torch.int64
        expect(fits, f"lengths int64 [{len(qkv)}]", lengths)
        expect_device(lengths, qkv)
    tokens = qkv.shape[1] if token_index is None else token_index.shape[1]
    gradient = qkv.requires_grad and torch.is_grad_enabled()
    size = AttentionSize(tokens, qkv.shape[4], gradient)
    chosen = choose("gather_attention", qkv.device, qkv.dtype, backend, size)
    out, row = _GatherAttention.apply(qkv, token_index, lengths, importance, chosen)
    return out, row if importance else None


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        token_index: Tensor | None,
        lengths: Tensor | None,
        importance: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(qkv, token_index, lengths)
        ctx.backend = backend
        out, row = backend.functions.gather_attention(qkv, token_index, lengths, importance)
        ctx.mark_non_differentiable(row)
        ctx.set_materialize_grads(False)
        return out, row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None:
            gradient = ctx.backend.functions.gather_attention_backward(grad, *ctx.saved_tensors)
        return gradient, None, None, None, None
