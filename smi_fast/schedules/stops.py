"""Sparse Model Inversion's schedule: drop the least important patches at a few iterations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from numbers import Integral, Real

from smi_fast.ops.grid import neighbourhood_mean
from smi_fast.schedules.base import Selection, Stop, ascend, check_stops


@dataclass(frozen=True)
class StopSchedule:
    """Drops the least important patches at a few iterations (SMI, arXiv 2510.27186).

    >>> StopSchedule(at=(50, 100), drop=(0.3, 0.3)).counts(196)
    (137, 95)

    Args:
        at: iterations of the stops, ascending, from 1. The published ones are for 4000 iterations.
        drop: share of the kept patches that each stop drops, in [0, 1): of K patches
            ``int(K * (1 - share))`` stay.
        compact: whether importance is first averaged over each patch's 3 x 3 neighbourhood, in
            which stopped patches count as 0, so that patches stay which belong together.

    Raises:
        ValueError: stops that aren't whole numbers or don't ascend from 1, shares out of range, not
            one share per stop, or compact that is neither True nor False.
    """

    at: tuple[int, ...] = (50, 100, 200, 300)
    drop: tuple[float, ...] = (0.3, 0.3, 0.3, 0.3)
    compact: bool = False

    def __post_init__(self) -> None:
        at = check_stops(self.at)
        try:
            drop = tuple(self.drop)
        except TypeError:
            raise ValueError(f"expected shares to drop, (0.3, 0.3), got {self.drop!r}") from None
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "drop", drop)
        if len(at) != len(drop):
            raise ValueError(
                f"expected a share to drop for each stop, got {len(at)} stops, {drop=}"
            )
        if not all(isinstance(share, Real) and 0 <= share < 1 for share in drop):
            raise ValueError(f"expected shares to drop in [0, 1), got {drop}")
        if self.compact not in (True, False):
            raise ValueError(f"expected compact True or False, got {self.compact!r}")

    @classmethod
    def scaled(cls, iterations: int, *, compact: bool = False) -> StopSchedule:
        """The published stops at the same fractions of a run of another length than 4000.

        Raises:
            ValueError: iterations that are no whole number, or too few to keep the stops apart.
        """
        _check_length(iterations)
        published = cls()

        def scaled(length: int) -> list[int]:
            return [round(t * length / 4000) for t in published.at]

        least = next(n for n in itertools.count(max(iterations, 1)) if ascend(scaled(n)))
        if least != iterations:
            raise ValueError(
                f"expected {least} or more iterations, to keep {len(published.at)} stops apart, "
                f"got {iterations}"
            )
        return cls(tuple(scaled(iterations)), published.drop, compact)

    @classmethod
    def once(cls, iterations: int, *, keep: float = 0.47, at: float = 0.1) -> StopSchedule:
        """One early, compact stop: most patches stop as soon as their importance can be told.

        >>> StopSchedule.once(100).counts(64)
        (30,)

        Args:
            iterations: T of the run.
            keep: share of the patches that stay, in (0, 1].
            at: where the stop is, as a share of the run, in (0, 1); it is after at least one
                iteration.

        Raises:
            ValueError: a share out of range, or iterations that are no whole number from 2.
        """
        _check_length(iterations)
        if not (isinstance(keep, Real) and 0 < keep <= 1 and isinstance(at, Real) and 0 < at < 1):
            raise ValueError(f"expected keep in (0, 1] and at in (0, 1), got {keep!r} and {at!r}")
        stop = max(1, round(at * iterations))
        if stop >= iterations:
            raise ValueError(f"expected iterations after the stop at {stop}, got {iterations}")
        return cls((stop,), (1 - keep,), compact=True)

    @property
    def remaining(self) -> float:
        """Share of the patches left after the last stop, before rounding."""
        return math.prod(1.0 - share for share in self.drop)

    def counts(self, patches: int) -> tuple[int, ...]:
        counts = []
        for stop, share in zip(self.at, self.drop, strict=True):
            before, patches = patches, _staying(patches, share)
            if patches < 1:
                raise ValueError(f"the stop at {stop} drops all of {before} patches")
            counts.append(patches)
        return tuple(counts)

    def select(self, stop: Stop) -> Selection:
        share = self.drop[self.at.index(stop.iteration)]
        count = _staying(stop.kept.shape[1], share)
        importance = stop.importance
        if self.compact:
            importance = neighbourhood_mean(importance, stop.kept, stop.grid)
        top = importance.topk(count, dim=1).indices
        return Selection(stop.kept.gather(1, top).sort(dim=1).values)


def _check_length(iterations: int) -> None:
    if not isinstance(iterations, Integral):
        raise ValueError(f"expected iterations as a whole number, got {iterations!r}")


def _staying(patches: int, share: float) -> int:
    # The published expression, so that rounding agrees: int(10 * (1 - 0.3)) is 7, not 6.
    return int(patches * (1.0 - share))
