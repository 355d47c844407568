"""The engine of GPUs: frozen blocks as products of torch, and one kernel between two of them.

- The affine part of norms and LayerScale are folded into the weights, as on the CPU.
- The residual add is fused into the next norm, also that of the last block and the norm behind it,
  which with the blocks before are one function. On tensor cores GELU and its derivative are
  fused into the products of the MLP, so that a block takes 14 kernels, forward and backward. In
  float32, where a product takes many times as long, all are cuBLAS's, and a block takes 16.
- Rotary positions are one kernel more each way. SwiGLU is a kernel of its own in any precision, and
  a norm inside of attention or of the MLP is one forward and two backward.
- Only tokens have a gradient.
- Buffers are allocated once per (batch, tokens). Only the attention ops make their own results.
- In bfloat16, so are the weights and the bias of queries, rounded once after folding, and what
  products read and write. The residual stream, other biases, softmax, GELU and every sum are
  float32.

Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smi_fast.engine.embedding import Embedding
from smi_fast.engine.folding import first_unfoldable, unfoldable
from smi_fast.engine.gpu_last_rows import LastRows
from smi_fast.engine.gpu_run import PlannedRun
from smi_fast.engine.gpu_steps import BACKEND
from smi_fast.engine.precision import FLOAT32
from smi_fast.engine.rotations import Rotations
from smi_fast.engine.weights import FollowsWeights
from smi_fast.ops import backends


class GpuEngine(FollowsWeights[PlannedRun, LastRows]):
    """Runs the blocks of one teacher on a GPU; folds them anew after their weights have changed.

    Args:
        blocks: all blocks of the teacher, frozen.
        precision: of the products, see :mod:`smi_fast.engine.precision`.
        attention: the backend of attention; "auto" takes the first that can.

    Attributes:
        backend: the name under which ``backend=`` asks for it.
    """

    backend = BACKEND

    def __init__(
        self, blocks: nn.Sequential, precision: str = FLOAT32, attention: str = backends.AUTO
    ) -> None:
        super().__init__(blocks)
        self._blocks = list(blocks)
        self._precision, self._attention = precision, attention
        self._unfoldable = first_unfoldable(self._blocks)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it can't run these blocks on such tokens, or None when it can."""
        if self._unfoldable is not None:
            return unfoldable(self._unfoldable)
        reason = backends.by_name(BACKEND).why_not("gather_attention", device, dtype)
        if reason is None and dtype != torch.float32:
            return f"the engine takes a teacher in float32, got {dtype}"
        return reason

    def embed(self, patches: Tensor, positions: Tensor, embedding: Embedding) -> Tensor:
        """The tokens [B, P + K, D] of patches [B, K, C·P·P] at positions int64 [B, K]."""
        tokens: Tensor = _EmbedPatches.apply(patches, positions, embedding)
        return tokens

    def run(self, tokens: Tensor, start: int, stop: int, rotations: Rotations = None) -> Tensor:
        """Tokens [B, N, D] after the blocks from ``start`` up to ``stop``, at least one; with the
        rotations of patches in each block of the teacher, or None.
        """
        self._follow_weights()
        key = start, stop, rotations is not None
        if key not in self._runs:
            blocks, rotary = self._blocks[start:stop], rotations is not None
            self._runs[key] = PlannedRun(blocks, self._precision, self._attention, rotary)
        return self._runs[key](tokens, None if rotations is None else rotations[start:stop])

    def run_ragged(self, rows: Tensor, start: int, stop: int, offsets: Tensor) -> Tensor:
        """Never called: on a GPU the rows of images stay padded, see ``Blocks.ragged``."""
        raise NotImplementedError("concatenated rows of images are for the CPU")

    def run_to_rows(
        self,
        tokens: Tensor,
        start: int,
        rows: int,
        norm: nn.Module | None,
        rotations: Rotations = None,
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] after the blocks from ``start`` on and the norm behind them, and
        their attention probabilities [B, H, R, N], which have no gradient. With rotations, R is at
        most the number of prefix tokens.
        """
        self._follow_weights()
        key = start, rows, rotations is not None
        if key not in self._last:
            arguments = self._blocks[start:], rows, self._precision, self._attention
            self._last[key] = LastRows(*arguments, rotations is not None)
        return self._last[key](tokens, norm, None if rotations is None else rotations[start:])

    def last_block_rows(
        self,
        tokens: Tensor,
        rows: int,
        rotations: Rotations = None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`run_to_rows` of the last block, without the norm; there are no offsets."""
        return self.run_to_rows(tokens, len(self._blocks) - 1, rows, None, rotations)


class _EmbedPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, positions: Tensor, embedding: Embedding) -> Tensor:
        ctx.embedding = embedding
        projected = torch.mm(patches.flatten(0, 1), embedding.weight.T)
        steps = backends.by_name(BACKEND).functions
        tokens: Tensor = steps.embed_tokens(
            projected.view(*patches.shape[:2], -1), *embedding[1:], positions
        )
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # The rows in front of the patches are few: their product costs less than a copy without.
        every = torch.mm(grad.flatten(0, 1), ctx.embedding.weight)
        return every.view(*grad.shape[:2], -1)[:, ctx.embedding.prefix.shape[1] :], None, None
