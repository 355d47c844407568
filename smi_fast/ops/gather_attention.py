"""Self-attention among some or all tokens of each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.ops._checks import as_value_error, expect, expect_device, expect_index
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
    """Self-attention among some or all tokens of each image.

    It reads the output of the QKV projection and writes the input of the output projection, without
    a permuted copy. Equal to::

        if token_index is not None:
            index = token_index[:, :, None, None, None].expand(-1, -1, *qkv.shape[2:])
            qkv = qkv.gather(1, index)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.mT / D**0.5).softmax(-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        importance = probabilities[:, :, 0].mean(1)

    :class:`smi_fast.SparseViT` gathers patches as pixels, before they are embedded, and calls this
    without ``token_index``. That argument serves loops that drop tokens inside the network.

    >>> qkv = torch.randn(2, 65, 3, 4, 32)
    >>> out, importance = ops.gather_attention(qkv, importance=True)
    >>> out.shape, importance.shape
    (torch.Size([2, 65, 128]), torch.Size([2, 65]))

    Args:
        qkv: [B, N, 3, H, D], any strides.
        token_index: int64 [B, K], the distinct rows of ``qkv`` that attend to each other, prefix
            tokens included; None for all rows in order.
        lengths: int64 [B], number of tokens of each image, from 0 to K; later rows of ``out`` are
            zero. None for K in each image.
        importance: also return the importance. It has no gradient.
        backend: see :mod:`smi_fast.ops.backends`.

    Returns:
        out [B, K, H·D]; and the importance [B, K] or None: the first token's attention
        probabilities, averaged over heads.

    Raises:
        ValueError: wrong shape, data type or device;
            with the C++ kernels also a number of ``token_index`` out of range.
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
    try:
        out, row = _GatherAttention.apply(qkv, token_index, lengths, importance, chosen)
    except RuntimeError as error:
        raise as_value_error(error) from None
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
