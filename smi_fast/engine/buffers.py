"""Memory that the CPU engine plans once, and how passes of both engines take and return theirs."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from smi_fast.engine.folding import FoldedBlock


class Buffers:
    """The memory of one pass over blocks, forward and backward.

    It is kept from pass to pass: memory that went back to the system would be faulted in again. A
    pass of fewer rows takes the first ones, as when images leave a batch.

    Args:
        blocks: of the pass.
        rows: the most rows of a pass.
        saves: whether a backward pass follows.

    Attributes:
        shape: (batch, tokens) of the pass that it was last fitted to.
    """

    def __init__(self, blocks: list[FoldedBlock], rows: int, saves: bool) -> None:
        self._rows, self._saves, first = rows, saves, blocks[0]
        width, self._heads = len(first.q_bias), first.heads
        self.shape: tuple[int, int] | None = None
        new, new_rstd = first.qkv.new_empty, first.q_bias.new_empty

        def two_norms() -> list[Tensor]:
            """Outputs of a block's two norms: normalized [rows, D] and rstd [rows], twice."""
            outputs = (new(rows, len(first.proj_bias)) for _ in range(2))
            return [tensor for output in outputs for tensor in (output, new_rstd(rows))]

        shared = two_norms()
        self._normalized = [*shared]
        for _ in blocks[1:]:
            self._normalized += two_norms() if saves else shared
        self._attended = new(rows, width)
        self._hidden = new(rows, first.fc2.shape[1])
        self._d_qkv = new(rows, 3 * width)

    def hold(self, rows: int, saves: bool) -> bool:
        """Whether the memory suffices for a pass of this many rows, and is of its kind."""
        return rows <= self._rows and saves == self._saves

    def fit(self, batch: int, tokens: int) -> None:
        """Give the passes from here on the rows that they need."""
        self.shape = batch, tokens
        rows, width = batch * tokens, self._attended.shape[1]
        self.normalized = [tensor[:rows] for tensor in self._normalized]
        shape = batch, tokens, self._heads, width // self._heads
        self.attended = self._attended[:rows].view(shape)
        self.hidden, self.d_qkv = self._hidden[:rows], self._d_qkv[:rows]


class _Lender(Protocol):
    free: Any


class Lease:
    """Gives buffers back to their run when the autograd graph that holds this is freed.

    Args:
        run: it keeps them as ``free``; None for buffers that are used once.
        buffers: of one pass.
    """

    def __init__(self, run: _Lender | None, buffers: Any) -> None:
        self.run, self.buffers = run, buffers

    def __del__(self) -> None:
        if self.run is not None:
            self.run.free = self.buffers
