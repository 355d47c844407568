"""Engines: consecutive frozen blocks as one function, tokens in and tokens out.

A teacher lists its candidates once with :func:`candidates`, and asks :func:`choose` once per
forward. Without an engine it runs its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from smi_fast.engine.cpu import CpuEngine
from smi_fast.engine.embedding import Embedding
from smi_fast.engine.gpu import GpuEngine
from smi_fast.engine.memory import keep_products
from smi_fast.engine.precision import FLOAT32
from smi_fast.engine.rotations import Rotations
from smi_fast.ops import backends

keep_products()  # when it is imported, because a product may come before the first engine


class Engine(Protocol):
    """Runs the blocks of one teacher.

    Attributes:
        backend: the name under which ``backend=`` asks for it.
    """

    backend: str

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it can't run these blocks on such tokens, or None when it can."""

    def refresh(self) -> None:
        """Forget what was derived from the weights."""

    def derived(self) -> tuple[object, ...]:
        """What was derived from the weights."""

    def embed(self, patches: Tensor, positions: Tensor, embedding: Embedding) -> Tensor:
        """The tokens [B, P + K, D] of patches [B, K, C·P·P] at positions int64 [B, K]."""

    def run(self, tokens: Tensor, start: int, stop: int, rotations: Rotations = None) -> Tensor:
        """Tokens [B, N, D] after the blocks from ``start`` up to ``stop``, at least one.

        ``rotations`` are those of all blocks, of the last tokens [B, K, 1 or H, 2d], or None.
        """

    def run_ragged(self, rows: Tensor, start: int, stop: int, offsets: Tensor) -> Tensor:
        """Concatenated rows [R, D] of images after some blocks; image b has those from
        ``offsets[b]`` up to ``offsets[b + 1]``, int64.
        """

    def run_to_rows(
        self,
        tokens: Tensor,
        start: int,
        rows: int,
        norm: nn.Module,
        rotations: Rotations = None,
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] after the blocks from ``start`` on and the norm behind them, and
        their attention probabilities [B, H, R, N] in the last block, which have no gradient.
        """

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


def candidates(
    blocks: nn.Sequential, precision: str = FLOAT32, backend: str = backends.AUTO
) -> tuple[Engine, ...]:
    """Every engine there is, for these frozen blocks in a precision of :mod:`.precision`.

    Args:
        blocks: all blocks of a teacher.
        precision: of their products.
        backend: of attention, where an engine takes it from an op.
    """
    return CpuEngine(blocks, precision), GpuEngine(blocks, precision, backend)


def choose(
    engines: Sequence[Engine],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    precision: str = FLOAT32,
) -> Engine | None:
    """The engine that runs tokens of this device and data type, or None.

    A compiler gets none, because it is to see the blocks themselves; nor does autocast, which is to
    choose the data type of each layer. Another precision than float32 has no substitute: blocks
    that run one by one don't have it.

    Args:
        engines: the candidates, in the order of preference.
        device: of the tokens.
        dtype: of the tokens.
        backend: as the ops take it; an engine of another backend is not chosen.
        precision: of the candidates.

    Raises:
        BackendUnavailable: there is no such backend, or no engine for another precision than
            float32; the message says why.
    """
    if torch.compiler.is_compiling():
        reasons = ["torch.compile is to see the blocks themselves"]
    else:
        wanted, reasons = backends.resolve(backend), []
        for engine in engines:
            if wanted not in (backends.AUTO, engine.backend):
                reasons.append(f"{wanted} has no engine")
                continue
            reason = engine.why_not(device, dtype)
            if reason is None and torch.is_autocast_enabled(device.type):
                reason = "autocast chooses the data type of each layer"
            if reason is None:
                return engine
            reasons.append(f"{engine.backend}: {reason}")
    if precision == FLOAT32:
        return None
    found = "; ".join(dict.fromkeys(reasons))
    raise backends.BackendUnavailable(f"no engine runs in {precision} here: {found}")
