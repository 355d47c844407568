"""The blocks up to the last one on a GPU, of which only the first rows are computed, and the norm
behind it: one autograd function, so that no step between them is a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from smi_fast.engine.buffers import Lease
from smi_fast.engine.folding import is_centred, is_foldable_norm
from smi_fast.engine.gpu_run import Pending, PlannedRun
from smi_fast.engine.gpu_steps import Normalized, Steps
from smi_fast.engine.precision import products_in
from smi_fast.engine.rotations import Rotations, rotations_like


class LastRows:
    """Consecutive blocks that end with the last one, of which only the first rows are computed.

    Args:
        blocks: one or more that :class:`GpuEngine` computes, frozen.
        rows: R, at least one; where keys are rotated at most the number of prefix tokens.
        precision: of the products.
        attention: the backend of attention in the blocks before the last one.
        rotary: whether queries and keys are rotated.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], rows: int, precision: str, attention: str, rotary: bool
    ) -> None:
        *before, last = blocks
        self.rows, self.steps = rows, Steps(precision)
        self.run = PlannedRun(before, precision, attention, rotary) if before else None
        self.block = self.steps.folded(last)
        self.to_q, self.to_kv = self.block.qkv.tensor_split([len(self.block.q_bias)])
        v_bias = self.block.v_bias
        self.kv_bias: Tensor | None = None
        if v_bias is not None:  # the bias of keys cancels in the softmax, or is for rotate_()
            self.kv_bias = F.pad(v_bias, (len(v_bias), 0)).to(self.block.qkv.dtype)

    def __call__(
        self, tokens: Tensor, norm: nn.Module | None, rotations: Rotations
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] after the blocks and a norm, for tokens [B, N, D], and their
        attention probabilities [B, H, R, N] in the last block, which have no gradient.
        """
        behind = None if norm is None or is_foldable_norm(norm) else norm
        saves = torch.is_grad_enabled() and tokens.requires_grad
        fused = norm if behind is None else None
        result, probabilities = _RunToRows.apply(tokens, self, fused, saves, rotations)
        return result if behind is None else behind(result), probabilities

    def forward(
        self, pending: Pending, norm: Any, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor, _Saved]:
        """The rows [B, R, D] after the last block and the norm, probabilities, and what backward
        reads.
        """
        block, steps, rows = self.block, self.steps.functions, self.rows
        batch, count, _ = pending.x.shape
        x, new, centred = pending.x.flatten(0, 1), block.qkv.new_empty, block.centred
        normalized, rstd = new(x.shape), x.new_empty(len(x))
        steps.add_normalize_(x, *pending[1:], block.eps[0], normalized, rstd, centred)
        first = normalized.unflatten(0, (batch, count))[:, :rows].flatten(0, 1)
        q = torch.mm(first, self.to_q.T).unflatten(0, (batch, rows))
        kv = F.linear(normalized, self.to_kv, self.kv_bias).view(batch, count, 2, block.heads, -1)
        if rotation is not None:
            steps.rotate_(kv, block.k_bias, rotation, block.half)
        attended, probabilities = steps.attend_rows(q, block.q_bias, kv)
        attended, to_proj = self._normalized(attended.flatten(0, 1), block.proj_eps)

        y = x.new_empty(batch * rows, x.shape[1])
        to_mlp, mlp_rstd = new(y.shape), y.new_empty(len(y))
        added = torch.mm(attended, block.proj.T)
        written = block.eps[1], y, to_mlp, mlp_rstd, centred
        steps.add_normalize_rows_(pending.x[:, :rows], added, block.proj_bias, *written)
        derivative, hidden = new(len(y), len(block.fc1)), new(len(y), block.fc2.shape[1])
        self.steps.activate(block, to_mlp, derivative, hidden)
        hidden, to_fc2 = self._normalized(hidden, block.fc2_eps)
        added = torch.mm(hidden, block.fc2.T)
        if norm is None:
            y += added
            y += block.fc2_bias
            result, final, final_rstd = y, None, None
        else:
            result, final, final_rstd = (
                torch.empty_like(y),
                torch.empty_like(y),
                y.new_empty(len(y)),
            )
            affine = norm.weight, getattr(norm, "bias", None)
            written = norm.eps, final, final_rstd, result, is_centred(norm)
            steps.final_norm_(y, added, block.fc2_bias, *affine, *written)
        saved = normalized, rstd, q, kv, probabilities, to_mlp, mlp_rstd, derivative
        inner = *(to_proj or (None, None)), *(to_fc2 or (None, None))
        left = _Saved(*saved, final, final_rstd, *inner)
        return result.unflatten(0, (batch, rows)), probabilities, left

    def _normalized(self, x: Tensor, eps: float | None) -> tuple[Tensor, Normalized | None]:
        """Rows after a norm inside of the block, if there is one, and what it leaves."""
        if eps is None:
            return x, None
        left = Normalized(torch.empty_like(x), self.block.q_bias.new_empty(len(x)))
        return self.steps.normalize(x, eps, left, self.block.centred), left

    def backward(
        self,
        grad: Tensor,
        saved: _Saved,
        norm: Any,
        operand: Tensor | None,
        rotation: Tensor | None,
    ) -> Tensor:
        """The gradient [B·N, D] of tokens in front of the last block, from that of the rows.

        Unless it is None, ``operand`` [B·N, D] gets a copy.
        """
        block, steps, q = self.block, self.steps.functions, saved.q
        grad = grad.contiguous().flatten(0, 1)
        half = block.qkv.dtype != grad.dtype
        copy = torch.empty_like(grad, dtype=block.qkv.dtype) if half else None
        if saved.final is None:
            gradient = grad.clone()
            if copy is not None:
                copy.copy_(gradient)
        else:
            gradient = torch.empty_like(grad)
            final = saved.final, saved.final_rstd, norm.weight, gradient, copy
            steps.final_norm_backward_(grad, *final, is_centred(norm))
        of_rows = gradient if copy is None else copy
        centred, (to_proj, to_fc2) = block.centred, saved.inner()
        d_hidden = of_rows.new_empty(len(of_rows), block.fc2.shape[1])
        d_gated = torch.empty_like(saved.derivative) if block.gated else None
        of_mlp = saved.derivative, to_fc2, d_hidden, d_gated
        d_to_mlp = torch.mm(self.steps.activate_backward(block, of_rows, *of_mlp), block.fc1)
        steps.normalize_backward_(gradient, d_to_mlp, saved.to_mlp, saved.mlp_rstd, copy, centred)
        d_attended = torch.mm(of_rows, block.proj)
        d_attended = self.steps.normalize_backward(d_attended, to_proj, centred).view(q.shape)
        of_attention = q, block.q_bias, saved.kv, saved.probabilities
        d_q, d_kv = steps.attend_rows_backward(d_attended, *of_attention)
        if rotation is not None:
            steps.rotate_backward_(d_kv, 1, rotation, block.half)

        d_normalized = torch.mm(d_kv.flatten(2).flatten(0, 1), self.to_kv)
        of_images = d_normalized.unflatten(0, saved.kv.shape[:2])
        for row in range(self.rows):
            of_images[:, row].addmm_(d_q[:, row], self.to_q)
        result = d_normalized.new_empty(d_normalized.shape, dtype=gradient.dtype)
        written = saved.normalized, saved.rstd, result, operand, centred
        steps.normalize_backward_rows_(gradient.view(q.shape), d_normalized, *written)
        return result


class _Saved(NamedTuple):
    """What backward reads of the last block, and of the norm behind it if that is fused.

    Attributes:
        normalized: [B·N, D], output of the first norm.
        rstd: float32 [B·N], of it.
        q: [B, R, H·d].
        kv: [B, N, 2, H, d].
        probabilities: float32 [B, H, R, N].
        to_mlp: [B·R, D], output of the second norm.
        mlp_rstd: float32 [B·R], of it.
        derivative: [B·R, F] of GELU, or [B·R, 2F] of SwiGLU.
        final: float32 [B·R, D], output of the norm behind the block, before its weight; or None.
        final_rstd: float32 [B·R], of it; or None.
        to_proj: output of the norm in front of proj; or None.
        proj_rstd: float32 [B·R], of it; or None.
        to_fc2: output of the norm in front of fc2; or None.
        fc2_rstd: float32 [B·R], of it; or None.
    """

    normalized: Tensor
    rstd: Tensor
    q: Tensor
    kv: Tensor
    probabilities: Tensor
    to_mlp: Tensor
    mlp_rstd: Tensor
    derivative: Tensor
    final: Tensor | None
    final_rstd: Tensor | None
    to_proj: Tensor | None
    proj_rstd: Tensor | None
    to_fc2: Tensor | None
    fc2_rstd: Tensor | None

    def inner(self) -> list[Normalized | None]:
        """What the norms in front of proj and of fc2 left."""
        pairs = (self.to_proj, self.proj_rstd), (self.to_fc2, self.fc2_rstd)
        return [None if x is None or r is None else Normalized(x, r) for x, r in pairs]


class _RunToRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, rows: LastRows, norm: Any, saves: bool, rotations: Rotations
    ) -> tuple[Tensor, Tensor]:
        run, pending = rows.run, Pending(tokens.contiguous())
        rotations = rotations_like(rotations, tokens)
        ctx.lease, ctx.rotation = Lease(None, None), None if rotations is None else rotations[-1]
        with products_in(rows.steps.precision):
            if run is not None:
                ctx.lease = run.acquire(tokens, saves)
                before = None if rotations is None else rotations[:-1]
                ctx.with_tokens = run.attention_for(tokens, saves), before
                pending = run.forward(pending.x, ctx.lease.buffers, *ctx.with_tokens)
            result, probabilities, saved = rows.forward(pending, norm, ctx.rotation)
        ctx.rows, ctx.norm = rows, norm
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(probabilities)
        ctx.set_materialize_grads(False)
        return result, probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        rows, run, buffers = ctx.rows, ctx.rows.run, ctx.lease.buffers
        saved = _Saved(*ctx.saved_tensors)
        operand = None if run is None else buffers.operand
        with products_in(rows.steps.precision):
            result = rows.backward(grad, saved, ctx.norm, operand, ctx.rotation)
            if run is not None:
                run.backward(result, buffers, *ctx.with_tokens)
        return result.unflatten(0, saved.kv.shape[:2]), None, None, None, None
