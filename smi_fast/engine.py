"""The blocks of a frozen Vision Transformer on the CPU, at little more than their GEMMs' cost.

Weights are constant and only tokens get a gradient. So LayerNorm's affine part, LayerScale and most
biases are folded into the matrices; attention and GELU read what one product wrote and write what
the next one reads; LayerNorm adds the product before it to the residual stream; backward needs six
arrays a block, and all memory is planned once for a shape. The products stay torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smi_fast import _schemas  # noqa: F401  (registers torch.ops.smi_fast.*)

# Named down to the overload: looking that up costs as much as a call.
_add_normalize = torch.ops.smi_fast.add_normalize_.default
_normalize_backward = torch.ops.smi_fast.normalize_backward_.default
_gelu = torch.ops.smi_fast.gelu_.default
_attend = torch.ops.smi_fast.attend_.default
_attend_backward = torch.ops.smi_fast.attend_backward_.default

_CAN_PACK = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
if _CAN_PACK:
    _pack = torch.ops.mkl._mkl_reorder_linear_weight.default
    _packed_linear = torch.ops.mkl._mkl_linear.default

# MKL packs a matrix anew for each product, which costs the more the fewer rows use it. To pack it
# once takes as long as a pass and saves up to a fifth of each: done at this pass, for so few rows.
_PASSES_UNPACKED = 12
_MOST_ROWS_PACKED = 512


def supports(block: Block) -> bool:
    """Whether the engine computes a block: LayerNorm, GELU, LayerScale or none, no other norm."""
    attention, mlp = block.attn, block.mlp
    norms = (block.norm1, block.norm2)
    plain = (attention.q_norm, attention.k_norm, attention.norm, getattr(mlp, "norm", None))
    return (
        all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        and all(isinstance(module, nn.Identity) for module in plain)
        and getattr(attention, "gate", None) is None
        and type(mlp) is Mlp
        and isinstance(mlp.fc1, nn.Linear)
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and all(isinstance(m, (nn.Identity, LayerScale)) for m in (block.ls1, block.ls2))
    )


class _Matrix:
    """A frozen matrix [out, in], which can be packed both ways for a number of rows to multiply."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self._transposed = self.weight.T
        self._rows = 0
        self._packed: list[Tensor] = []

    def pack(self, rows: int) -> None:
        """Prepares for so many rows, which takes the matrix's memory twice; none drops that."""
        self._rows, self._packed = 0, []
        if rows and _CAN_PACK and self.weight.dtype == torch.float32:
            both = (self.weight, self._transposed.contiguous())
            self._rows, self._packed = rows, [_pack(matrix, rows) for matrix in both]

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] times the transposed matrix."""
        if not self._packed:
            return x @ self._transposed
        product: Tensor = _packed_linear(x, self._packed[0], self.weight, None, self._rows)
        return product

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of x from that of the product [rows, out]."""
        if not self._packed:
            return gradient @ self.weight
        product: Tensor = _packed_linear(
            gradient, self._packed[1], self._transposed, None, self._rows
        )
        return product


@dataclass(frozen=True)
class _Weights:
    """One block, folded. With A the width of attention and F that of the MLP:

    Attributes:
        qkv: [3A, D]. The bias of k cancels in softmax, that of v passes through attention.
        q_bias: [A].
        proj: [D, A].
        proj_bias: [D].
        fc1: [F, D].
        fc1_bias: [F].
        fc2: [D, F].
        fc2_bias: [D].
        eps: of both LayerNorms.
        heads: of attention.
    """

    qkv: _Matrix
    q_bias: Tensor
    proj: _Matrix
    proj_bias: Tensor
    fc1: _Matrix
    fc1_bias: Tensor
    fc2: _Matrix
    fc2_bias: Tensor
    eps: tuple[float, float]
    heads: int

    @classmethod
    @torch.no_grad()
    def fold(cls, block: Block) -> _Weights:
        attention, mlp = block.attn, block.mlp
        qkv, qkv_bias = _after_norm(attention.qkv, block.norm1)
        q_bias, _, v_bias = qkv_bias.chunk(3)
        proj, proj_bias = _before_scale(attention.proj, block.ls1, v_bias)
        fc1, fc1_bias = _after_norm(mlp.fc1, block.norm2)
        fc2, fc2_bias = _before_scale(mlp.fc2, block.ls2)
        return cls(
            _Matrix(qkv),
            q_bias.contiguous(),
            _Matrix(proj),
            proj_bias,
            _Matrix(fc1),
            fc1_bias,
            _Matrix(fc2),
            fc2_bias,
            (block.norm1.eps, block.norm2.eps),
            attention.num_heads,
        )


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that is fed the norm's output without its affine part."""
    return linear.weight * norm.weight, _bias(linear) + linear.weight @ norm.bias


def _before_scale(
    linear: nn.Linear, scale: nn.Module, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and the LayerScale behind it, its input short of ``extra``."""
    weight, bias = linear.weight, _bias(linear)
    if extra is not None:
        bias = bias + weight @ extra
    if isinstance(scale, LayerScale):
        weight, bias = scale.gamma[:, None] * weight, scale.gamma * bias
    return weight, bias


class _Saved:
    """What backward needs of one block."""

    qkv: Tensor
    derivative: Tensor

    def __init__(self, weights: _Weights, rows: int) -> None:
        new, width = weights.q_bias.new_empty, len(weights.proj_bias)
        self.normalized = [new(rows, width) for _ in range(2)]
        self.rstd = [new(rows) for _ in range(2)]


class _Plan:
    """The memory of one pass over blocks, forward and backward.

    It is held from pass to pass: memory that went back to the system would come back page by page.
    """

    def __init__(self, blocks: list[_Weights], batch: int, tokens: int, saves: bool) -> None:
        self.key = (batch, tokens, saves)
        self.passes = 0
        rows, first = batch * tokens, blocks[0]
        one = _Saved(first, rows)
        self.saved = [one, *(_Saved(first, rows) if saves else one for _ in blocks[1:])]
        new, width = first.q_bias.new_empty, len(first.q_bias)
        self.qkv_shape = (batch, tokens, 3, first.heads, width // first.heads)
        self.attended = new(rows, width)
        self.hidden = new(rows, len(first.fc1_bias))
        self.d_qkv = new(rows, 3 * width)


class _Lease:
    """A plan that goes back to the engine once nobody can run backward over it any more."""

    def __init__(self, engine: Engine, plan: _Plan) -> None:
        self.engine, self.plan = engine, plan

    def __del__(self) -> None:
        self.engine.free = self.plan


class Engine:
    """Consecutive blocks as one function of their tokens.

    Args:
        blocks: one or more that :func:`supports` says yes to, frozen, on the CPU.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = [_Weights.fold(block) for block in blocks]
        self.free: _Plan | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """What the blocks make of tokens [B, N, D]."""
        saves = torch.is_grad_enabled() and tokens.requires_grad
        result: Tensor = _Run.apply(tokens, self, saves)
        return result

    def lease(self, batch: int, tokens: int, saves: bool) -> _Lease:
        """Memory for one pass: the last one's when it is free and fits."""
        plan, self.free = self.free, None
        if plan is None or plan.key != (batch, tokens, saves):
            self._pack(0)
            plan = _Plan(self.blocks, batch, tokens, saves)
        plan.passes += 1
        if plan.passes == _PASSES_UNPACKED and batch * tokens <= _MOST_ROWS_PACKED:
            self._pack(batch * tokens)
        return _Lease(self, plan)

    def _pack(self, rows: int) -> None:
        for w in self.blocks:
            for matrix in (w.qkv, w.proj, w.fc1, w.fc2):
                matrix.pack(rows)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, engine: Engine, saves: bool) -> Tensor:
        lease = engine.lease(tokens.shape[0], tokens.shape[1], saves)
        ctx.engine, ctx.lease = engine, lease
        result = tokens.clone(memory_format=torch.contiguous_format)
        _forward(engine.blocks, lease.plan, result.flatten(0, 1))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        result = grad.clone(memory_format=torch.contiguous_format)
        _backward(ctx.engine.blocks, ctx.lease.plan, result.flatten(0, 1))
        return result, None, None


def _forward(blocks: list[_Weights], plan: _Plan, x: Tensor) -> None:
    """Turns the residual stream x [rows, D] into that after the blocks."""
    added = bias = None
    for w, saved in zip(blocks, plan.saved, strict=True):
        to_attention, to_mlp = saved.normalized
        _add_normalize(x, added, bias, w.eps[0], to_attention, saved.rstd[0])
        saved.qkv = w.qkv(to_attention).view(plan.qkv_shape)
        _attend(saved.qkv, w.q_bias, plan.attended)
        added = w.proj(plan.attended)
        _add_normalize(x, added, w.proj_bias, w.eps[1], to_mlp, saved.rstd[1])
        saved.derivative = w.fc1(to_mlp)
        _gelu(saved.derivative, w.fc1_bias, plan.hidden)
        added, bias = w.fc2(plan.hidden), w.fc2_bias
    assert added is not None and bias is not None
    x += added
    x += bias


def _backward(blocks: list[_Weights], plan: _Plan, gradient: Tensor) -> None:
    """Turns the gradient [rows, D] after the blocks into that before them."""
    for w, saved in zip(reversed(blocks), reversed(plan.saved), strict=True):
        to_attention, to_mlp = saved.normalized
        d_hidden = w.fc2.back(gradient).mul_(saved.derivative)
        d_mlp = w.fc1.back(d_hidden)
        _normalize_backward(gradient, d_mlp, to_mlp, saved.rstd[1])
        d_attended = w.proj.back(gradient)
        _attend_backward(d_attended, saved.qkv, w.q_bias, plan.d_qkv)
        d_attention = w.qkv.back(plan.d_qkv)
        _normalize_backward(gradient, d_attention, to_attention, saved.rstd[0])
