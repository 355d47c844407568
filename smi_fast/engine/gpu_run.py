"""Whole blocks on a GPU, as one autograd function of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smi_fast.engine.buffers import Lease
from smi_fast.engine.folding import FoldedBlock
from smi_fast.engine.gpu_steps import Normalized, Steps
from smi_fast.engine.precision import products_in
from smi_fast.engine.rotations import Rotations, rotations_like
from smi_fast.ops import backends
from smi_fast.ops.limits import AttentionSize


class Pending(NamedTuple):
    """Tokens x [B, N, D] as a sum x + added + bias, which the next norm takes in its kernel.

    Attributes:
        x: float32 [B, N, D].
        added: [B·N, D]; None where x is the sum.
        bias: float32 [D], or None.
    """

    x: Tensor
    added: Tensor | None = None
    bias: Tensor | None = None


class PlannedRun:
    """Consecutive blocks as one autograd function of their tokens.

    Args:
        blocks: one or more that :class:`GpuEngine` computes, frozen.
        precision: of the products.
        attention: the backend of attention.
        rotary: whether queries and keys are rotated.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], precision: str, attention: str, rotary: bool
    ) -> None:
        self.steps, self.attention = Steps(precision), attention
        self.blocks = [self.steps.folded(block) for block in blocks]
        self.qkv_biases = [_qkv_bias(block, rotary) for block in self.blocks]
        self.rotary_biases = [block.query_bias(rotary=True) for block in self.blocks if rotary]
        self.free: _Buffers | None = None

    def __call__(self, tokens: Tensor, rotations: Rotations) -> Tensor:
        """Tokens [B, N, D] after the blocks, with the rotation of each where these are rotary."""
        saves = torch.is_grad_enabled() and tokens.requires_grad
        result: Tensor = _RunBlocks.apply(tokens, self, saves, rotations)
        return result

    def acquire(self, tokens: Tensor, saves: bool) -> Lease:
        """Buffers for one pass: those of the last pass when they are free and fit.

        A CUDA graph has buffers of its own, in its memory, because it is replayed at any time. They
        replace those of the passes before it.
        """
        key = tokens.shape[0], tokens.shape[1], saves
        buffers, self.free = self.free, None
        captured = _is_captured(tokens.device)
        if captured or buffers is None or buffers.key != key:
            del buffers
            with torch.inference_mode(False):  # else no other pass could write into them
                buffers = _Buffers(self.blocks, key)
        return Lease(None if captured else self, buffers)

    def attention_for(self, tokens: Tensor, saves: bool) -> Any:
        """The functions of the backend that computes attention among tokens [B, N, D]."""
        block = self.blocks[0]
        size = AttentionSize(tokens.shape[1], len(block.q_bias) // block.heads, saves)
        chosen = backends.choose(
            "gather_attention", tokens.device, block.qkv.dtype, self.attention, size
        )
        return chosen.functions

    def forward(
        self, tokens: Tensor, buffers: _Buffers, attention: Any, rotations: Rotations
    ) -> Pending:
        """The tokens [B, N, D] after the blocks, as a sum that is still to be taken."""
        steps, x = self.steps.functions, tokens.flatten(0, 1)
        pending: tuple[Tensor | None, Tensor | None] = (None, None)
        for index, (block, saved) in enumerate(zip(self.blocks, buffers.saved, strict=True)):
            to_attention, to_mlp = saved.to_attention, saved.to_mlp
            (rstd, mlp_rstd), centred, mlp_eps = saved.rstd, block.centred, block.eps[1]
            steps.add_normalize_(x, *pending, block.eps[0], to_attention, rstd, centred)
            qkv, qkv_bias = saved.qkv.flatten(2).flatten(0, 1), self.qkv_biases[index]
            if qkv_bias is None:
                torch.mm(to_attention, block.qkv.T, out=qkv)
            else:
                torch.addmm(qkv_bias, to_attention, block.qkv.T, out=qkv)
            if rotations is not None:
                rotary_bias = self.rotary_biases[index]
                steps.rotate_(saved.qkv, rotary_bias, rotations[index], block.half)
            attended = attention.gather_attention(saved.qkv, None, None, False)[0].flatten(0, 1)
            attended = self.steps.normalize(attended, block.proj_eps, saved.to_proj, centred)
            torch.mm(attended, block.proj.T, out=buffers.of_rows)
            of_attention, normalized = (buffers.of_rows, block.proj_bias), (to_mlp, mlp_rstd)
            if pending[0] is None:  # the tokens are someone else's, so they don't change
                x = torch.empty_like(x)
                written = mlp_eps, x, *normalized, centred
                steps.add_normalize_rows_(tokens, *of_attention, *written)
            else:
                steps.add_normalize_(x, *of_attention, mlp_eps, *normalized, centred)
            self.steps.activate(block, to_mlp, saved.derivative, buffers.hidden)
            hidden = buffers.hidden
            hidden = self.steps.normalize(hidden, block.fc2_eps, saved.to_fc2, centred)
            torch.mm(hidden, block.fc2.T, out=buffers.of_rows)
            pending = buffers.of_rows, block.fc2_bias
        return Pending(x.view_as(tokens), *pending)

    def backward(
        self, gradient: Tensor, buffers: _Buffers, attention: Any, rotations: Rotations
    ) -> None:
        """Change the gradient [B·N, D] of tokens after the blocks into that before them.

        The buffers' operand has a copy of it where products are of another data type.
        """
        steps, copy = self.steps.functions, buffers.operand
        operand = gradient if copy is None else copy
        for index in reversed(range(len(self.blocks))):
            block, saved = self.blocks[index], buffers.saved[index]
            (rstd, mlp_rstd), centred = saved.rstd, block.centred
            of_mlp = saved.derivative, saved.to_fc2, buffers.hidden, buffers.d_gated
            d_fc1 = self.steps.activate_backward(block, operand, *of_mlp)
            d_rows = torch.mm(d_fc1, block.fc1, out=buffers.of_rows)
            steps.normalize_backward_(gradient, d_rows, saved.to_mlp, mlp_rstd, copy, centred)
            d_attended = torch.mm(operand, block.proj, out=buffers.d_attended.flatten(0, 1))
            d_attended = self.steps.normalize_backward(d_attended, saved.to_proj, centred)
            d_attended = d_attended.view(buffers.d_attended.shape)
            d_qkv = attention.gather_attention_backward(d_attended, saved.qkv, None, None)
            if rotations is not None:
                steps.rotate_backward_(d_qkv, 2, rotations[index], block.half)
            torch.mm(d_qkv.flatten(2).flatten(0, 1), block.qkv, out=d_rows)
            # Nothing reads a copy in front of the first block.
            last = None if index == 0 else copy
            steps.normalize_backward_(gradient, d_rows, saved.to_attention, rstd, last, centred)


def _qkv_bias(block: FoldedBlock, rotary: bool) -> Tensor | None:
    """The bias [3A] that is added to qkv in its product, in the type of products, or None.

    The bias of keys cancels in the softmax, and that of values is in proj_bias unless a norm is in
    front of proj. With rotary positions a step behind the product adds those of queries and keys.
    """
    if rotary and block.v_bias is None:
        return None
    none = torch.zeros_like(block.q_bias)
    biases = none if rotary else block.q_bias, none, none if block.v_bias is None else block.v_bias
    return torch.cat(biases).to(block.qkv.dtype)


def _is_captured(device: torch.device) -> bool:
    """Whether what a device is asked for now becomes a part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Saved(NamedTuple):
    """What backward reads of one block.

    Attributes:
        to_attention: [B·N, D], output of the first norm.
        to_mlp: [B·N, D], output of the second one.
        rstd: float32 [2, B·N], of both.
        qkv: [B, N, 3, H, d], as attention takes it.
        derivative: [B·N, F] of GELU, or [B·N, 2F] of SwiGLU.
        to_proj: output of the norm in front of proj, where there is one.
        to_fc2: that of the norm in front of fc2.
    """

    to_attention: Tensor
    to_mlp: Tensor
    rstd: Tensor
    qkv: Tensor
    derivative: Tensor
    to_proj: Normalized | None
    to_fc2: Normalized | None


class _Buffers:
    """The memory of one pass over blocks, forward and backward.

    Args:
        blocks: that run.
        key: B, N, and whether there will be a backward pass.

    Attributes:
        saved: of each block; without a gradient all share one.
        of_rows: [B·N, D], what a product adds to the tokens, or to the gradient.
        hidden: [B·N, F], the hidden layer of the MLP, or its gradient.
        d_gated: [B·N, 2F], the gradient of the first layer of SwiGLU; None with GELU.
        d_attended: [B, N, H·d], the gradient of attention's output.
        operand: [B·N, D], the gradient in the data type of products; None where it has that type.
    """

    def __init__(self, blocks: list[FoldedBlock], key: tuple[int, int, bool]) -> None:
        self.key, first = key, blocks[0]
        batch, tokens, saves = key
        rows, width, heads = batch * tokens, len(first.q_bias), first.heads
        new, new32 = first.qkv.new_empty, first.q_bias.new_empty
        channels, layer, hidden = len(first.proj_bias), len(first.fc1), first.fc2.shape[1]

        def inner(eps: float | None, size: int) -> Normalized | None:
            return None if eps is None else Normalized(new(rows, size), new32(rows))

        self.saved = [
            _Saved(
                new(rows, channels),
                new(rows, channels),
                new32(2, rows),
                new(batch, tokens, 3, heads, width // heads),
                new(rows, layer),
                inner(first.proj_eps, width),
                inner(first.fc2_eps, hidden),
            )
            for _ in (blocks if saves else blocks[:1])
        ]
        if not saves:
            self.saved *= len(blocks)
        self.of_rows, self.hidden = new(rows, channels), new(rows, hidden)
        self.d_gated = new((rows if saves else 0), layer) if first.gated else None
        self.d_attended = new((batch, tokens, width) if saves else (0, 0, width))
        half = first.qkv.dtype != first.q_bias.dtype
        self.operand = new(rows, channels) if half and saves else None


class _RunBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, run: PlannedRun, saves: bool, rotations: Rotations
    ) -> Tensor:
        ctx.run, ctx.lease = run, run.acquire(tokens, saves)
        ctx.with_tokens = run.attention_for(tokens, saves), rotations_like(rotations, tokens)
        with products_in(run.steps.precision):
            x, added, bias = run.forward(tokens.contiguous(), ctx.lease.buffers, *ctx.with_tokens)
        ctx.save_for_backward()
        assert added is not None and bias is not None
        x += added.view_as(x)
        x += bias
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _ = ctx.saved_tensors  # raises when the graph has been freed
        result, operand = (
            grad.clone(memory_format=torch.contiguous_format),
            ctx.lease.buffers.operand,
        )
        if operand is not None:
            operand.copy_(result.flatten(0, 1))
        with products_in(ctx.run.steps.precision):
            ctx.run.backward(result.flatten(0, 1), ctx.lease.buffers, *ctx.with_tokens)
        return result, None, None, None
