"""When patches stop, and which ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Schedule(Protocol):
    """Decides at which iterations patches are dropped and which stay."""

    @property
    def at(self) -> tuple[int, ...]:
        """Iterations of the stops, ascending. A stop reads the importance of the one before."""

    @property
    def remaining(self) -> float:
        """Share of the patches left after the last stop, before rounding."""

    def counts(self, patches: int) -> tuple[int, ...]:
        """Kept patches after each stop, of an image that has ``patches``.

        Raises:
            ValueError: when a stop would drop every patch.
        """

    def select(self, kept: Tensor, importance: Tensor, count: int) -> Tensor:
        """The patches that stay.

        Args:
            kept: int64 [B, K], ascending.
            importance: [B, K].
            count: how many stay, at most K.

        Returns:
            int64 [B, count], ascending.
        """


@dataclass(frozen=True)
class Dense:
    """Every patch is kept to the end: the dense loop."""

    @property
    def at(self) -> tuple[int, ...]:
        return ()

    @property
    def remaining(self) -> float:
        return 1.0

    def counts(self, patches: int) -> tuple[int, ...]:
        return ()

    def select(self, kept: Tensor, importance: Tensor, count: int) -> Tensor:
        raise AssertionError("a dense schedule has no stops")


@dataclass(frozen=True)
class StopSchedule:
    """Drops the least important patches at a few iterations: Sparse Model Inversion (arXiv
    2510.27186).

    Args:
        at: iterations of the stops, ascending, from 1. The published ones are for 4000 iterations.
        drop: share of the remaining patches that each stop drops, in [0, 1): of K patches
            ``int(K * (1 - share))`` stay.

    Raises:
        ValueError: stops that don't ascend from 1, shares out of range, or a different number of
            both.
    """

    at: tuple[int, ...] = (50, 100, 200, 300)
    drop: tuple[float, ...] = (0.3, 0.3, 0.3, 0.3)

    def __post_init__(self) -> None:
        at, drop = tuple(self.at), tuple(self.drop)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "drop", drop)
        if len(at) != len(drop):
            raise ValueError(
                f"expected a share to drop for each stop, got {len(at)} stops, {drop=}"
            )
        if list(at) != sorted(set(at)) or min(at, default=1) < 1:
            raise ValueError(f"expected stops that ascend from 1 or later, got {at}")
        if any(not 0 <= share < 1 for share in drop):
            raise ValueError(f"expected shares to drop in [0, 1), got {drop}")

    @classmethod
    def scaled(cls, iterations: int) -> StopSchedule:
        """The published stops at the same fractions of a run of another length than 4000.

        Raises:
            ValueError: fewer iterations than keep the stops apart.
        """
        published = cls()
        return cls(tuple(round(t * iterations / 4000) for t in published.at), published.drop)

    @property
    def remaining(self) -> float:
        return math.prod(1.0 - share for share in self.drop)

    def counts(self, patches: int) -> tuple[int, ...]:
        counts = []
        for stop, share in zip(self.at, self.drop, strict=True):
            before = patches
            # The published expression, so that rounding agrees: int(10 * (1 - 0.3)) is 7, not 6.
            patches = int(patches * (1.0 - share))
            if patches < 1:
                raise ValueError(f"the stop at {stop} drops all of {before} patches")
            counts.append(patches)
        return tuple(counts)

    def select(self, kept: Tensor, importance: Tensor, count: int) -> Tensor:
        top = importance.topk(count, dim=1).indices
        return kept.gather(1, top).sort(dim=1).values


def still_iterations(schedule: Schedule) -> frozenset[int]:
    """Iterations without jitter: each stop, and the one before, whose importance it reads."""
    return frozenset(t - before for t in schedule.at for before in (0, 1))
