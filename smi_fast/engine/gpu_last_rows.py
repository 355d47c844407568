"""The last block on a GPU, of which only the first rows are computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from smi_fast.engine.gpu_steps import Normalized, Steps
from smi_fast.engine.precision import products_in


class LastRows:
    """The last block, of which only the first rows are computed.

    Args:
        block: one that :class:`GpuEngine` computes, frozen.
        rows: R, at least one; where keys are rotated at most the number of prefix tokens.
        precision: of the products.
    """

    def __init__(self, block: nn.Module, rows: int, precision: str) -> None:
        self.rows, self.steps = rows, Steps(precision)
        self.block = self.steps.folded(block)
        self.to_q, self.to_kv = self.block.qkv.tensor_split([len(self.block.q_bias)])
        v_bias = self.block.v_bias
        self.kv_bias: Tensor | None = None
        if v_bias is not None:  # the bias of keys cancels in the softmax, or is for rotate_()
            self.kv_bias = F.pad(v_bias, (len(v_bias), 0)).to(self.block.qkv.dtype)

    def __call__(self, tokens: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] of the block's output for tokens [B, N, D], and their attention
        probabilities [B, H, R, N], which have no gradient. The keys of patches may be rotated.
        """
        if rotation is not None:
            rotation = rotation.to(tokens.dtype).contiguous()
        result: tuple[Tensor, Tensor] = _RunLastRows.apply(tokens, self, rotation)
        return result

    def forward(self, tokens: Tensor, rotation: Tensor | None) -> tuple[Tensor, _Saved]:
        """The rows [B, R, D] after the block, and what backward reads."""
        block, steps, rows = self.block, self.steps.functions, self.rows
        batch, count, _ = tokens.shape
        x, new = tokens.contiguous().flatten(0, 1), block.qkv.new_empty
        normalized, rstd = new(x.shape), x.new_empty(len(x))
        centred = block.centred
        steps.add_normalize_(x, None, None, block.eps[0], normalized, rstd, centred)
        first = normalized.unflatten(0, (batch, count))[:, :rows].flatten(0, 1)
        q = torch.mm(first, self.to_q.T).unflatten(0, (batch, rows))
        kv = F.linear(normalized, self.to_kv, self.kv_bias).view(batch, count, 2, block.heads, -1)
        if rotation is not None:
            steps.rotate_(kv, block.k_bias, rotation, block.half)
        attended, probabilities = steps.attend_rows(q, block.q_bias, kv)
        attended, to_proj = self._normalized(attended.flatten(0, 1), block.proj_eps)

        result = tokens[:, :rows].clone(memory_format=torch.contiguous_format)
        y = result.flatten(0, 1)
        to_mlp, mlp_rstd = new(y.shape), y.new_empty(len(y))
        added = torch.mm(attended, block.proj.T)
        bias, eps = block.proj_bias, block.eps[1]
        steps.add_normalize_(y, added, bias, eps, to_mlp, mlp_rstd, centred)
        derivative, hidden = new(len(y), len(block.fc1)), new(len(y), block.fc2.shape[1])
        self.steps.activate(block, to_mlp, derivative, hidden)
        hidden, to_fc2 = self._normalized(hidden, block.fc2_eps)
        y += torch.mm(hidden, block.fc2.T)
        y += block.fc2_bias
        return result, _Saved(
            probabilities,
            *(normalized, rstd, q, kv, to_mlp, mlp_rstd, derivative),
            *(to_proj or (None, None)),
            *(to_fc2 or (None, None)),
        )

    def _normalized(self, x: Tensor, eps: float | None) -> tuple[Tensor, Normalized | None]:
        """Rows after a norm inside of the block, if there is one, and what it leaves."""
        if eps is None:
            return x, None
        left = Normalized(torch.empty_like(x), self.block.q_bias.new_empty(len(x)))
        return self.steps.normalize(x, eps, left, self.block.centred), left

    def backward(self, grad: Tensor, saved: _Saved, rotation: Tensor | None) -> Tensor:
        """The gradient [B, N, D] of tokens, from that of the rows and what forward saved."""
        block, steps, rows = self.block, self.steps.functions, self.rows
        (q, kv), centred = (saved.q, saved.kv), block.centred
        gradient = grad.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        operand = gradient.to(block.qkv.dtype)
        copy = None if operand is gradient else operand
        d_hidden = kv.new_empty(len(operand), block.fc2.shape[1])
        d_gated = torch.empty_like(saved.derivative) if block.gated else None
        to_fc2 = _left(saved.to_fc2, saved.fc2_rstd)
        d_fc1 = self.steps.activate_backward(
            block, operand, saved.derivative, to_fc2, d_hidden, d_gated
        )
        d_to_mlp = torch.mm(d_fc1, block.fc1)
        mlp = saved.to_mlp, saved.mlp_rstd
        steps.normalize_backward_(gradient, d_to_mlp, *mlp, copy, centred)
        d_attended, to_proj = torch.mm(operand, block.proj), _left(saved.to_proj, saved.proj_rstd)
        d_attended = self.steps.normalize_backward(d_attended, to_proj, centred).view(q.shape)
        d_q, d_kv = steps.attend_rows_backward(d_attended, q, block.q_bias, kv, saved.probabilities)
        if rotation is not None:
            steps.rotate_backward_(d_kv, 1, rotation, block.half)

        d_normalized = torch.mm(d_kv.flatten(2).flatten(0, 1), self.to_kv)
        of_images = d_normalized.unflatten(0, kv.shape[:2])
        of_images[:, :rows] += torch.mm(d_q.flatten(0, 1), self.to_q).unflatten(0, q.shape[:2])
        result = gradient.new_zeros(of_images.shape)
        result[:, :rows] = gradient.unflatten(0, q.shape[:2])
        x = result.flatten(0, 1)
        steps.normalize_backward_(x, d_normalized, saved.normalized, saved.rstd, None, centred)
        return result


class _Saved(NamedTuple):
    """What backward reads: of the norms what each wrote, of those inside of the block None where
    there is none, and what attention and the activation left.
    """

    probabilities: Tensor
    normalized: Tensor
    rstd: Tensor
    q: Tensor
    kv: Tensor
    to_mlp: Tensor
    mlp_rstd: Tensor
    derivative: Tensor
    to_proj: Tensor | None
    proj_rstd: Tensor | None
    to_fc2: Tensor | None
    fc2_rstd: Tensor | None


def _left(rows: Tensor | None, rstd: Tensor | None) -> Normalized | None:
    return None if rows is None or rstd is None else Normalized(rows, rstd)


class _RunLastRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, block: LastRows, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with products_in(block.steps.precision):
            result, saved = block.forward(tokens, rotation)
        ctx.block, ctx.rotation = block, rotation
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(saved.probabilities)
        ctx.set_materialize_grads(False)
        return result, saved.probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        with products_in(ctx.block.steps.precision):
            saved = _Saved(*ctx.saved_tensors)
            return ctx.block.backward(grad, saved, ctx.rotation), None, None
