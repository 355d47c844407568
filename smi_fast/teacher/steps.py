"""The steps of one block behind its attention, by its own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.eva import EvaBlock
from torch import Tensor

from smi_fast.teacher.mlp import behind_hidden, hidden_layer


def after_attention(block: Any, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Tokens [B, R, D] in front of a block's MLP.

    Args:
        block: which one.
        x: tokens before the block [B, R, D].
        y: their first norm [B, R, D].
        out: attention's output [B, R, H·d].
    """
    attention = block.attn
    out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(y).sigmoid()
    x = x + _layer_scales(block)[0](attention.proj(out))
    return x


def hidden(block: Any, x: Tensor) -> Tensor:
    """The hidden layer [B, R, F] of a block's MLP, for the tokens in front of it."""
    return hidden_layer(block.mlp, block.norm2(x))


def after_mlp(block: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """Tokens after a block [B, R, D], of those in front of its MLP and of its hidden layer."""
    return x + _layer_scales(block)[1](behind_hidden(block.mlp, hidden))


def _layer_scales(block: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """LayerScale of a block's attention and of its MLP; in Eva a factor, or None."""
    if not isinstance(block, EvaBlock):
        return block.ls1, block.ls2
    first, second = (
        (lambda y: y) if gamma is None else gamma.mul for gamma in (block.gamma_1, block.gamma_2)
    )
    return first, second
