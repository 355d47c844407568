"""A block of the engine, composed of the reference's steps: what rounds where it rounds."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from smi_fast.engine import reference
from smi_fast.engine.folding import FoldedBlock


class Passed(NamedTuple):
    """Tokens after blocks, and the gradient of the tokens before them."""

    tokens: Tensor
    gradient: Tensor


class _Saved(NamedTuple):
    """What the backward of a block reads: outputs of its norms, qkv, and derivatives of GELU."""

    to_attention: Tensor
    attention_rstd: Tensor
    qkv: Tensor
    to_mlp: Tensor
    mlp_rstd: Tensor
    derivative: Tensor


def in_float64(block: FoldedBlock) -> FoldedBlock:
    """The same numbers in float64."""
    values = {field.name: getattr(block, field.name) for field in fields(block)}
    return replace(block, **{k: v.double() for k, v in values.items() if isinstance(v, Tensor)})


def run_by_steps(blocks: list[FoldedBlock], tokens: Tensor, grad: Tensor) -> Passed:
    """Forward and backward of blocks with GELU and without rotary positions.

    Args:
        blocks: their matrices may be bfloat16.
        tokens: [B, N, D] in the data type of the biases.
        grad: the gradient of the result, likewise.
    """
    x, gradient, saved = tokens.flatten(0, 1).clone(), grad.flatten(0, 1).clone(), []
    for block in blocks:
        to_attention, attention_rstd = _normalized(x, block, 0)
        heads = (3, block.heads, -1)
        qkv = (to_attention @ block.qkv.T).unflatten(1, heads).unflatten(0, tokens.shape[:2])
        attended = torch.empty_like(qkv[:, :, 0])
        reference.attend_(qkv, block.q_bias, attended)
        x += attended.flatten(2).flatten(0, 1) @ block.proj.T + block.proj_bias
        to_mlp, mlp_rstd = _normalized(x, block, 1)
        derivative = to_mlp @ block.fc1.T
        hidden = torch.empty_like(derivative)
        reference.gelu_(derivative, block.fc1_bias, hidden)
        x += hidden @ block.fc2.T + block.fc2_bias
        saved.append(_Saved(to_attention, attention_rstd, qkv, to_mlp, mlp_rstd, derivative))
    for block, s in zip(reversed(blocks), reversed(saved), strict=True):
        operand = gradient.to(block.qkv.dtype)
        d_fc1 = operand @ block.fc2 * s.derivative
        reference.normalize_backward_(gradient, d_fc1 @ block.fc1, s.to_mlp, s.mlp_rstd, operand)
        d_qkv = torch.empty_like(s.qkv)
        reference.attend_backward_(operand @ block.proj, s.qkv, block.q_bias, d_qkv)
        d_normalized = d_qkv.flatten(2).flatten(0, 1) @ block.qkv
        reference.normalize_backward_(
            gradient, d_normalized, s.to_attention, s.attention_rstd, None
        )
    return Passed(x.view_as(tokens), gradient.view_as(tokens))


def _normalized(x: Tensor, block: FoldedBlock, which: int) -> tuple[Tensor, Tensor]:
    normalized, rstd = torch.empty_like(x, dtype=block.qkv.dtype), x.new_empty(len(x))
    reference.add_normalize_(x, None, None, block.eps[which], normalized, rstd)
    return normalized, rstd
