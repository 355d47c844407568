"""Engines: consecutive frozen blocks as one function, tokens in and tokens out.

A teacher lists its candidates once with :func:`candidates`, and asks :func:`choose` once per
forward. Without an engine it runs its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from smi_fast.engine.cpu import CpuEngine, Rotations
from smi_fast.ops import backends


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

    def run(self, tokens: Tensor, start: int, stop: int, rotations: Rotations = None) -> Tensor:
        """Tokens [B, N, D] after the blocks from ``start`` up to ``stop``, at least one.

        ``rotations`` are those of all blocks, of the last tokens [B, K, 1 or H, 2d], or None.
        """

    def last_block_rows(
        self, tokens: Tensor, rows: int, rotations: Rotations = None
    ) -> tuple[Tensor, Tensor]:
        """The first rows [B, R, D] after the last block, and their attention probabilities
        [B, H, R, N], which have no gradient.
        """


def candidates(blocks: nn.Sequential) -> tuple[Engine, ...]:
    """Every engine there is, for these frozen blocks."""
    return (CpuEngine(blocks),)


def choose(
    engines: Sequence[Engine], device: torch.device, dtype: torch.dtype, backend: str
) -> Engine | None:
    """The engine that runs tokens of this device and data type, or None.

    A compiler gets none, because it is to see the blocks themselves; nor does autocast, which is to
    choose the data type of each layer.

    Args:
        engines: the candidates, in the order of preference.
        device: of the tokens.
        dtype: of the tokens.
        backend: as the ops take it; an engine of another backend is not chosen.
    """
    if torch.compiler.is_compiling():
        return None
    wanted = backends.resolve(backend)
    for engine in engines:
        if wanted in (backends.AUTO, engine.backend) and engine.why_not(device, dtype) is None:
            return None if torch.is_autocast_enabled(device.type) else engine
    return None
