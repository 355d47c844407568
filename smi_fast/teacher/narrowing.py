"""Narrowing: fewer tokens in deeper blocks, those that the class token attends to most so far."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor


def check_narrow(
    narrow: Mapping[int, float] | None, depth: int, rows_read: int | None
) -> dict[int, float]:
    """The shares by block, ascending.

    Args:
        narrow: {block: share}, or None.
        depth: number of the teacher's blocks.
        rows_read: the first tokens that the head reads; None for all.

    Raises:
        ValueError: no block after the first, a share out of range, or a teacher whose head reads
            more than its first tokens, so that no class token says which patches matter.
    """
    if narrow is None:
        return {}
    if not isinstance(narrow, Mapping):
        raise ValueError(f"expected narrow as {{block: share}}, {{6: 0.5}}, got {narrow!r}")
    for block, share in narrow.items():
        if not isinstance(block, Integral) or not 1 <= block < depth:
            raise ValueError(f"expected blocks to narrow in 1..{depth - 1}, got {block!r}")
        if not (isinstance(share, Real) and 0 < share <= 1):
            raise ValueError(f"expected shares to narrow to in (0, 1], got {share!r}")
    if narrow and rows_read is None:
        raise ValueError(
            "expected a teacher whose head reads its class token, by which narrow chooses tokens, "
            "got one that pools all of them: leave narrow out"
        )
    return {int(block): float(narrow[block]) for block in sorted(narrow)}


def refuse_narrowed(blocks: Collection[int], narrow: Mapping[int, float]) -> None:
    """Refuse taps that don't have a token for each kept patch.

    Raises:
        ValueError: a block at or after the first narrowed one is tapped.
    """
    if blocks and narrow and max(blocks) >= min(narrow):
        raise ValueError(
            f"expected taps in front of block {min(narrow)}, from which on narrow leaves tokens "
            f"out, got block {max(blocks)}"
        )


def most_attended(row: Tensor, share: float) -> Tensor:
    """Places int64 [B, K'], ascending, of the greatest of row [B, K]; K' = int(K * share), or 1."""
    count = max(1, int(row.shape[1] * share))
    return row.topk(count, dim=1).indices.sort(dim=1).values


def with_prefix(places: Tensor, prefix: int) -> Tensor:
    """Places [B, K] among patches as those among all tokens, behind the prefix tokens."""
    first = torch.arange(prefix, device=places.device).expand(len(places), -1)
    return torch.cat([first, places + prefix], dim=1)
