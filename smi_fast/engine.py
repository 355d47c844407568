"""The blocks of a frozen Vision Transformer on the CPU, at little more than their GEMMs' cost.

Weights are constant and only tokens get a gradient. So what is linear is folded into the matrices;
attention and GELU read what one product wrote and write what the next one reads; LayerNorm adds the
product before it to the residual stream; backward needs six arrays a block, and all memory is
planned once for a shape. The products stay torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smi_fast import _schemas  # noqa: F401  (registers torch.ops.smi_fast.*)
from smi_fast.folding import Folded, foldable

# Named down to the overload: looking that up costs as much as a call.
_run_blocks = torch.ops.smi_fast.run_blocks_.default
_run_blocks_backward = torch.ops.smi_fast.run_blocks_backward_.default
_first_rows = torch.ops.smi_fast.first_rows.default
_first_rows_backward = torch.ops.smi_fast.first_rows_backward.default

_version_of = attrgetter("_version")
_CAN_PACK = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")

# MKL packs a matrix anew for each product, which costs the more the fewer rows use it. To pack it
# once takes as long as a pass and saves up to a fifth of each: done at this pass, for so few rows.
_PASSES_UNPACKED = 12
_MOST_ROWS_PACKED = 512


class _Plan:
    """The memory of one pass over blocks, forward and backward.

    It is held from pass to pass: memory that went back to the system would come back page by page.
    """

    def __init__(self, blocks: list[Folded], batch: int, tokens: int, saves: bool) -> None:
        self.key = (batch, tokens, saves)
        self.passes = 0
        rows, first = batch * tokens, blocks[0]
        new, width, heads = first.q_bias.new_empty, len(first.q_bias), first.heads

        def normalized() -> list[Tensor]:
            """What the two norms of a block make of rows, with one over their deviations."""
            return [new(rows, *tail) for tail in ((len(first.proj_bias),), ()) * 2]

        one = normalized()
        self.normalized = [*one]
        for _ in blocks[1:]:
            self.normalized += normalized() if saves else one
        self.attended = new(batch, tokens, heads, width // heads)
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
        blocks: one or more that are :func:`smi_fast.folding.foldable`, frozen, on the CPU.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = [Folded.of(block) for block in blocks]
        self.free: _Plan | None = None
        self.eps = [eps for block in self.blocks for eps in block.eps]
        self.weights = [
            tensor
            for block in self.blocks
            for matrix, bias in zip(_matrices(block), _biases(block), strict=True)
            for tensor in (matrix, matrix.T, bias)
        ]
        self.packed: list[Tensor] = []
        self.packed_rows = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """What the blocks make of tokens [B, N, D]."""
        saves = torch.is_grad_enabled() and tokens.requires_grad
        result: Tensor = _Run.apply(tokens, self, saves)
        return result

    @property
    def products(self) -> tuple[list[Tensor], list[Tensor], int]:
        """What the products of a pass are made with."""
        return self.weights, self.packed, self.packed_rows

    def lease(self, batch: int, tokens: int, saves: bool) -> _Lease:
        """Memory for one pass: the last one's when it is free and fits."""
        plan, self.free = self.free, None
        if plan is None or plan.key != (batch, tokens, saves):
            self.packed, self.packed_rows = [], 0
            plan = _Plan(self.blocks, batch, tokens, saves)
        plan.passes += 1
        if plan.passes == _PASSES_UNPACKED and batch * tokens <= _MOST_ROWS_PACKED:
            self._pack(batch * tokens)
        return _Lease(self, plan)

    def _pack(self, rows: int) -> None:
        """Prepares the matrices, as they are and transposed, for so many rows to multiply."""
        if not rows or not _CAN_PACK or self.weights[0].dtype != torch.float32:
            return
        pack, self.packed_rows = torch.ops.mkl._mkl_reorder_linear_weight, rows
        self.packed = [
            pack(matrix.contiguous(), rows)
            for block in self.blocks
            for weight in _matrices(block)
            for matrix in (weight, weight.T)
        ]


def _matrices(block: Folded) -> tuple[Tensor, ...]:
    return block.qkv, block.proj, block.fc1, block.fc2


def _biases(block: Folded) -> tuple[Tensor, ...]:
    return block.q_bias, block.proj_bias, block.fc1_bias, block.fc2_bias


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, engine: Engine, saves: bool) -> Tensor:
        lease = engine.lease(tokens.shape[0], tokens.shape[1], saves)
        result, plan = tokens.clone(memory_format=torch.contiguous_format), lease.plan
        x, memory = result.flatten(0, 1), (plan.normalized, engine.eps, plan.attended, plan.hidden)
        *saved, added = _run_blocks(x, *engine.products, *memory, saves)
        x += added
        x += engine.blocks[-1].fc2_bias
        ctx.engine, ctx.lease, ctx.saved = engine, lease, saved
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        result, plan = grad.clone(memory_format=torch.contiguous_format), ctx.lease.plan
        memory = (plan.normalized, ctx.saved, plan.d_qkv)
        _run_blocks_backward(result.flatten(0, 1), *ctx.engine.products, *memory)
        return result, None, None


class FirstRows:
    """A block of which only the first rows are computed.

    Args:
        block: one that is :func:`smi_fast.folding.foldable`, frozen, on the CPU.
        rows: how many, at least one.
    """

    def __init__(self, block: Block, rows: int) -> None:
        folded = Folded.of(block)
        to_q, to_kv = folded.qkv.tensor_split([len(folded.q_bias)])
        self.weights = [to_q, to_kv, *_matrices(folded)[1:], *_biases(folded)]
        self.options = (folded.eps, folded.heads, rows)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] of what the block makes of tokens [B, N, D], and how much each
        of them attends to each token, [B, H, R, N], which has no gradient.
        """
        result: tuple[Tensor, Tensor] = _RunFirstRows.apply(tokens, self)
        return result


class _RunFirstRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, block: FirstRows) -> tuple[Tensor, Tensor]:
        result, *saved = _first_rows(tokens, block.weights, *block.options)
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
        return _first_rows_backward(grad, ctx.block.weights, ctx.saved_tensors), None


class FoldedBlocks:
    """The blocks of a teacher, folded anew whenever one asks and their weights have changed.

    Args:
        blocks: all of them, frozen.

    Attributes:
        possible: whether every block is :func:`smi_fast.folding.foldable`.
    """

    def __init__(self, blocks: nn.Sequential) -> None:
        self.possible = all(map(foldable, blocks))
        self._blocks = list(blocks)
        self._names = [
            (module, name)
            for module in blocks.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self._weights: list[object] = []
        self._engines: dict[tuple[int, int], Engine] = {}
        self._first_rows: dict[int, FirstRows] = {}

    def engine(self, start: int, stop: int) -> Engine:
        """The blocks from ``start`` up to ``stop``."""
        self._follow_weights()
        if (start, stop) not in self._engines:
            self._engines[start, stop] = Engine(self._blocks[start:stop])
        return self._engines[start, stop]

    def first_rows_of_last(self, rows: int) -> FirstRows:
        """So many rows of the last block."""
        self._follow_weights()
        if rows not in self._first_rows:
            self._first_rows[rows] = FirstRows(self._blocks[-1], rows)
        return self._first_rows[rows]

    def _follow_weights(self) -> None:
        """Forgets what was folded from other weights: whoever shares them may have changed them."""
        found = (module._parameters[name] for module, name in self._names)
        weights = [weight for weight in found if weight is not None]
        # One flat list of numbers, as this is done in each pass; a cast keeps identity and version.
        state = [weights[0].dtype, *map(id, weights), *map(_version_of, weights)]
        if self._weights != state:
            self._weights, self._engines, self._first_rows = state, {}, {}
