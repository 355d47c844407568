"""The last block on a GPU, of which only the first rows are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smi_fast.engine.gpu_steps import Steps
from smi_fast.engine.precision import products_in


class LastRows:
    """The last block, of which only the first rows are computed.

    Args:
        block: one that :class:`GpuEngine` computes, frozen.
        rows: R, at least one.
        precision: of the products.
    """

    def __init__(self, block: nn.Module, rows: int, precision: str) -> None:
        self.rows, self.steps = rows, Steps(precision)
        self.block = self.steps.folded(block)
        self.to_q, self.to_kv = self.block.qkv.tensor_split([len(self.block.q_bias)])

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] of the block's output for tokens [B, N, D], and their attention
        probabilities [B, H, R, N], which have no gradient.
        """
        result: tuple[Tensor, Tensor] = _RunLastRows.apply(tokens, self)
        return result

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The rows [B, R, D] after the block, probabilities, and what else backward reads."""
        block, steps, rows = self.block, self.steps.functions, self.rows
        batch, count, _ = tokens.shape
        x, new = tokens.contiguous().flatten(0, 1), block.qkv.new_empty
        normalized, rstd = new(x.shape), x.new_empty(len(x))
        centred = block.centred
        steps.add_normalize_(x, None, None, block.eps[0], normalized, rstd, centred)
        first = normalized.unflatten(0, (batch, count))[:, :rows].flatten(0, 1)
        q = torch.mm(first, self.to_q.T).unflatten(0, (batch, rows))
        kv = torch.mm(normalized, self.to_kv.T).view(batch, count, 2, block.heads, -1)
        attended, probabilities = steps.attend_rows(q, block.q_bias, kv)

        result = tokens[:, :rows].clone(memory_format=torch.contiguous_format)
        y = result.flatten(0, 1)
        to_mlp, mlp_rstd = new(y.shape), y.new_empty(len(y))
        added = torch.mm(attended.flatten(0, 1), block.proj.T)
        bias, eps = block.proj_bias, block.eps[1]
        steps.add_normalize_(y, added, bias, eps, to_mlp, mlp_rstd, centred)
        derivative, hidden = new(2, len(y), block.fc2.shape[1])
        self.steps.activate(block, to_mlp, derivative, hidden)
        y += torch.mm(hidden, block.fc2.T)
        y += block.fc2_bias
        return result, probabilities, normalized, rstd, q, kv, to_mlp, mlp_rstd, derivative

    def backward(self, grad: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """The gradient [B, N, D] of tokens, from that of the rows and what forward returned."""
        probabilities, normalized, rstd, q, kv, to_mlp, mlp_rstd, derivative = saved
        block, steps, rows = self.block, self.steps.functions, self.rows
        gradient = grad.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        operand = gradient.to(block.qkv.dtype)
        copy = None if operand is gradient else operand
        d_fc1 = torch.empty_like(derivative)
        self.steps.activate_backward(block, operand, derivative, d_fc1)
        d_to_mlp = torch.mm(d_fc1, block.fc1)
        centred = block.centred
        steps.normalize_backward_(gradient, d_to_mlp, to_mlp, mlp_rstd, copy, centred)
        d_attended = torch.mm(operand, block.proj).view(q.shape)
        d_q, d_kv = steps.attend_rows_backward(d_attended, q, block.q_bias, kv, probabilities)

        d_normalized = torch.mm(d_kv.flatten(2).flatten(0, 1), self.to_kv)
        of_images = d_normalized.unflatten(0, kv.shape[:2])
        of_images[:, :rows] += torch.mm(d_q.flatten(0, 1), self.to_q).unflatten(0, q.shape[:2])
        result = gradient.new_zeros(of_images.shape)
        result[:, :rows] = gradient.unflatten(0, q.shape[:2])
        x = result.flatten(0, 1)
        steps.normalize_backward_(x, d_normalized, normalized, rstd, None, centred)
        return result


class _RunLastRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, block: LastRows) -> tuple[Tensor, Tensor]:
        with products_in(block.steps.precision):
            result, *saved = block.forward(tokens)
        ctx.block = block
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(saved[0])
        ctx.set_materialize_grads(False)
        return result, saved[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        with products_in(ctx.block.steps.precision):
            return ctx.block.backward(grad, ctx.saved_tensors), None
