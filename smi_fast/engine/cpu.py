"""The CPU engine: frozen blocks at little more than the cost of their GEMMs.

- The affine part of LayerNorm or RMSNorm, and LayerScale, are folded into the weights.
- Attention, GELU and SwiGLU read the output of one GEMM and write the input of the next.
- The residual add is fused into the next norm.
- Only tokens have a gradient; backward needs six arrays of each block.
- Buffers are allocated once for the most rows of a pass. The GEMMs are torch's.
- In bfloat16, so are the weights, rounded once after folding, and what products read and write. The
  residual stream, biases, softmax, GELU and every sum are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smi_fast.engine import schemas  # noqa: F401  (registers torch.ops.smi_fast.*)
from smi_fast.engine.buffers import Buffers, Lease
from smi_fast.engine.embedding import Embedding, embed_patches
from smi_fast.engine.folding import (
    MATRICES,
    FoldedBlock,
    first_unfoldable,
    has_eva_steps,
    unfoldable,
)
from smi_fast.engine.memory import keep_freed_memory
from smi_fast.engine.precision import FLOAT32, ON_CPU, stored_type
from smi_fast.engine.rotations import Rotations, rotation_like, rotations_like
from smi_fast.engine.weights import FollowsWeights
from smi_fast.ops import backends, native

# Overloads, not packets: looking an overload up costs as much as a call.
_run_blocks = torch.ops.smi_fast.run_blocks_.default
_run_blocks_backward = torch.ops.smi_fast.run_blocks_backward_.default
_last_block_rows = torch.ops.smi_fast.last_block_rows.default
_last_block_rows_backward = torch.ops.smi_fast.last_block_rows_backward.default
_run_rotary_blocks = torch.ops.smi_fast.run_rotary_blocks_.default
_run_rotary_blocks_backward = torch.ops.smi_fast.run_rotary_blocks_backward_.default
_last_rotary_block_rows = torch.ops.smi_fast.last_rotary_block_rows.default
_last_rotary_block_rows_backward = torch.ops.smi_fast.last_rotary_block_rows_backward.default

# What an op takes of the tokens beside them: rotations, and whether they pair the channels of two
# halves; or where each of several concatenated images begins, else None.
Layout = tuple[list[Tensor], bool] | tuple[Tensor | None]

_MKL_PACKS = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")

# MKL and oneDNN repack the weights in every GEMM, up to a fifth of its time when there are few
# rows. Packing once costs about one pass: do it from pass _PASSES_UNPACKED on, at the first one of
# at most _MOST_ROWS_PACKED rows. MKL packs for one number of rows, oneDNN for any.
_PASSES_UNPACKED = 12
_MOST_ROWS_PACKED = 512


class CpuEngine(FollowsWeights["FoldedRun", "LastBlock"]):
    """Runs the blocks of one teacher in C++; folds them anew after their weights have changed.

    Args:
        blocks: all blocks of the teacher, frozen.
        precision: of the products, see :mod:`smi_fast.engine.precision`.

    Attributes:
        backend: the name under which ``backend=`` asks for it.
    """

    backend = "cpp"

    def __init__(self, blocks: nn.Sequential, precision: str = FLOAT32) -> None:
        super().__init__(blocks)
        self._blocks = list(blocks)
        self._precision = precision
        self._stored = stored_type(precision)
        self._unfoldable = first_unfoldable(self._blocks)
        self._has_eva_steps = any(has_eva_steps(block) for block in blocks)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it can't run these blocks on such tokens, or None when it can."""
        if self._unfoldable is not None:
            return unfoldable(self._unfoldable)
        reason = backends.by_name(self.backend).why_not("gather_attention", device, dtype)
        if reason is None and self._has_eva_steps and not native.has_cpu_kernel("rotate_"):
            return "the C++ kernels are of an older version, without the steps of Eva: build anew"
        if reason is None and self._precision not in ON_CPU:
            return f"{self._precision} is of the tensor cores of a GPU, got {device}"
        if reason is None and self._precision != FLOAT32 and dtype != torch.float32:
            return f"{self._precision} is of a teacher in float32, got {dtype}"
        return reason

    def embed(self, patches: Tensor, positions: Tensor, embedding: Embedding) -> Tensor:
        """The tokens [B, P + K, D] of patches [B, K, C·P·P] at positions int64 [B, K]."""
        return embed_patches(patches, positions, embedding)

    def run(self, tokens: Tensor, start: int, stop: int, rotations: Rotations = None) -> Tensor:
        """Tokens [B, N, D] after the blocks from ``start`` up to ``stop``, at least one."""
        run = self._run_of(start, stop, rotary=rotations is not None)
        return run(tokens, None if rotations is None else rotations[start:stop])

    def run_ragged(self, rows: Tensor, start: int, stop: int, offsets: Tensor) -> Tensor:
        """Concatenated rows [R, D] of images after some blocks; image b has those from
        ``offsets[b]`` up to ``offsets[b + 1]``, int64.
        """
        return self._run_of(start, stop, rotary=False)(rows[None], offsets=offsets)[0]

    def _run_of(self, start: int, stop: int, *, rotary: bool) -> FoldedRun:
        self._follow_weights()
        key = start, stop, rotary
        if key not in self._runs:
            self._runs[key] = FoldedRun(self._blocks[start:stop], rotary, self._stored)
        return self._runs[key]

    def run_to_rows(
        self,
        tokens: Tensor,
        start: int,
        rows: int,
        norm: nn.Module,
        rotations: Rotations = None,
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] after the blocks from ``start`` on and the norm behind them, and
        their attention probabilities [B, H, R, N], which have no gradient.
        """
        last = len(self._blocks) - 1
        if start < last:
            tokens = self.run(tokens, start, last, rotations)
        found, probabilities = self.last_block_rows(tokens, rows, rotations)
        return norm(found), probabilities

    def last_block_rows(
        self,
        tokens: Tensor,
        rows: int,
        rotations: Rotations = None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] after the last block, and their attention probabilities
        [B, H, R, N], which have no gradient.

        With ``offsets``, as in :meth:`run_ragged`, tokens [1, N, D] and probabilities [1, H, R, N]
        concatenate all images.
        """
        self._follow_weights()
        key = rows, rotations is not None
        if key not in self._last:
            rotary = rotations is not None
            self._last[key] = LastBlock(self._blocks[-1], rows, rotary, self._stored)
        return self._last[key](tokens, None if rotations is None else rotations[-1], offsets)


class FoldedRun:
    """Consecutive blocks as one autograd function of their tokens.

    Args:
        blocks: one or more that are :func:`smi_fast.engine.folding.foldable`, frozen, on the CPU.
        rotary: whether queries and keys are rotated.
        stored: data type of what products read and write; None for that of the weights.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        rotary: bool = False,
        stored: torch.dtype | None = None,
    ) -> None:
        self.blocks = [FoldedBlock.of(block).stored_as(stored) for block in blocks]
        self.rotary = rotary
        self.free: Buffers | None = None
        keep_freed_memory()
        self.eps = [eps for block in self.blocks for eps in block.eps]
        self.centred, self.approximate = self.blocks[0].centred, self.blocks[0].approximate
        self.weights = [tensor for block in self.blocks for tensor in _weights(block, rotary)]
        self._by_onednn = bool(torch.ops.smi_fast.products_by_onednn(self.weights[0]))
        self._passes = 0
        self.packed: list[Tensor] = []
        self.packed_rows = 0

    def __call__(
        self, tokens: Tensor, rotations: Rotations = None, offsets: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, N, D] after the blocks, with the rotation of each where these are rotary; or
        [1, R, D] of several images, which begin at offsets.
        """
        saves = torch.is_grad_enabled() and tokens.requires_grad
        layout: Layout = (offsets,)
        turns = rotations_like(rotations, tokens)
        if turns is not None:
            layout = turns, self.blocks[0].half
        result: Tensor = _RunBlocks.apply(tokens, self, saves, layout)
        return result

    @property
    def weights_for_gemm(self) -> tuple[list[Tensor], list[Tensor], int]:
        """The weights, the packed weights (or none), and the number of rows they are packed for, 0
        for any number.
        """
        return self.weights, self.packed, self.packed_rows

    def acquire(self, batch: int, tokens: int, saves: bool) -> Lease:
        """Buffers for one pass: those of the last pass when they are free and large enough."""
        buffers, self.free = self.free, None
        if buffers is None or not buffers.hold(batch * tokens, saves):
            buffers = Buffers(self.blocks, batch * tokens, saves)
        if buffers.shape != (batch, tokens):
            buffers.fit(batch, tokens)
            if not self._by_onednn:
                self.packed, self._passes = [], 0
        self._passes += 1
        few = 0 < batch * tokens <= _MOST_ROWS_PACKED
        if few and not self.packed and self._passes >= _PASSES_UNPACKED:
            self._pack(batch * tokens)
        return Lease(self, buffers)

    def _pack(self, rows: int) -> None:
        """Pack the weights and their transposes: by MKL for GEMMs of this many rows only."""
        if self._by_onednn:
            pack, self.packed_rows = torch.ops.mkldnn._reorder_linear_weight, 0
        elif _MKL_PACKS and self.weights[0].dtype == torch.float32:
            pack, self.packed_rows = torch.ops.mkl._mkl_reorder_linear_weight, rows
        else:
            return
        self.packed = [
            pack(matrix.contiguous(), rows)
            for block in self.blocks
            for weight in _matrices(block)
            for matrix in (weight, weight.T)
        ]


def _matrices(block: FoldedBlock) -> tuple[Tensor, ...]:
    return tuple(getattr(block, name) for name in MATRICES)


def _weights(block: FoldedBlock, rotary: bool) -> list[Tensor]:
    """Each matrix, its transpose and its bias; then the bias of v, where it is apart."""
    pairs = zip(_matrices(block), _biases(block, rotary), strict=True)
    found = [tensor for matrix, bias in pairs for tensor in (matrix, matrix.T, bias)]
    return found if block.v_bias is None else [*found, block.v_bias]


def _biases(block: FoldedBlock, rotary: bool) -> tuple[Tensor, ...]:
    return block.query_bias(rotary), block.proj_bias, block.fc1_bias, block.fc2_bias


class _RunBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, run: FoldedRun, saves: bool, layout: Layout) -> Tensor:
        lease = run.acquire(tokens.shape[0], tokens.shape[1], saves)
        result, buffers = tokens.clone(memory_format=torch.contiguous_format), lease.buffers
        x = result.flatten(0, 1)
        memory = (buffers.normalized, run.eps, buffers.attended, buffers.hidden)
        run_blocks = _run_rotary_blocks if run.rotary else _run_blocks
        kinds = run.centred, run.approximate
        *saved, added = run_blocks(x, *run.weights_for_gemm, *memory, saves, *layout, *kinds)
        x += added
        x += run.blocks[-1].fc2_bias
        ctx.run, ctx.lease, ctx.layout = run, lease, layout
        ctx.save_for_backward(*saved)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        result, buffers = grad.clone(memory_format=torch.contiguous_format), ctx.lease.buffers
        run, x = ctx.run, result.flatten(0, 1)
        memory = (buffers.normalized, list(ctx.saved_tensors), buffers.d_qkv)
        backward = _run_rotary_blocks_backward if run.rotary else _run_blocks_backward
        backward(x, *run.weights_for_gemm, *memory, *ctx.layout, run.centred)
        return result, None, None, None


class LastBlock:
    """The last block, of which only the first rows are computed.

    Args:
        block: one that is :func:`smi_fast.engine.folding.foldable`, frozen, on the CPU.
        rows: R, at least one; with ``rotary`` at most the number of prefix tokens.
        rotary: whether the queries and keys of patches are rotated.
        stored: data type of what products read and write; None for that of the weights.
    """

    def __init__(
        self,
        block: nn.Module,
        rows: int,
        rotary: bool = False,
        stored: torch.dtype | None = None,
    ) -> None:
        folded = FoldedBlock.of(block).stored_as(stored)
        to_q, to_kv = folded.qkv.tensor_split([len(folded.q_bias)])
        self.weights = [to_q, to_kv, *_matrices(folded)[1:], *_biases(folded, rotary=False)]
        self.weights += [folded.k_bias] if rotary else []
        self.weights += [] if folded.v_bias is None else [folded.v_bias]
        self.options, self.half = (folded.eps, folded.heads, rows), folded.half
        self.rotary, self.centred, self.approximate = rotary, folded.centred, folded.approximate

    def __call__(
        self, tokens: Tensor, rotation: Tensor | None = None, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] of the block's output for tokens [B, N, D], and their attention
        probabilities [B, H, R, N], which have no gradient. Tokens [1, N, D] and probabilities
        [1, H, R, N] may be of several images, which begin at offsets.
        """
        layout: tuple[Any, ...] = (offsets,)
        if rotation is not None:
            layout = rotation_like(rotation, tokens), self.half
        result: tuple[Tensor, Tensor] = _RunLastBlock.apply(tokens, self, layout)
        return result


class _RunLastBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, block: LastBlock, layout: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        run = _last_rotary_block_rows if block.rotary else _last_block_rows
        kinds = block.centred, block.approximate
        result, *saved = run(tokens, block.weights, *block.options, *layout, *kinds)
        ctx.block, ctx.layout = block, layout
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(saved[0])
        ctx.set_materialize_grads(False)
        return result, saved[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        block, saved = ctx.block, ctx.saved_tensors
        run = _last_rotary_block_rows_backward if block.rotary else _last_block_rows_backward
        return run(grad, block.weights, saved, *ctx.layout, block.centred), None, None
