"""From patches of pixels to tokens: in C++, as one function of the patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.engine import schemas  # noqa: F401  (registers torch.ops.smi_fast.*)

_embed_patches = torch.ops.smi_fast.embed_patches.default
_embed_patches_backward = torch.ops.smi_fast.embed_patches_backward.default


class Embedding(NamedTuple):
    """The frozen weights that make tokens of patches.

    Attributes:
        weight: [D, C·P·P].
        bias: [D], or None.
        prefix: [1, P, D], the tokens in front of the patches.
        at: [1, P, D], the embedding of their positions; None without any.
        table: [N, D], the embedding of each position of a patch; None without any.
    """

    weight: Tensor
    bias: Tensor | None
    prefix: Tensor
    at: Tensor | None
    table: Tensor | None


def embed_patches(patches: Tensor, positions: Tensor, embedding: Embedding) -> Tensor:
    """The tokens [B, P + K, D] of patches [B, K, C·P·P] at positions int64 [B, K], on the CPU."""
    tokens: Tensor = _EmbedPatches.apply(patches, positions, embedding)
    return tokens


class _EmbedPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, positions: Tensor, embedding: Embedding) -> Tensor:
        ctx.embedding = embedding
        weight, bias, prefix, at, table = embedding
        first = prefix if at is None else prefix + at
        tokens: Tensor = _embed_patches(patches, weight, bias, first, table, positions)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, prefix = ctx.embedding.weight, ctx.embedding.prefix
        return _embed_patches_backward(grad, weight, prefix.shape[1]), None, None
