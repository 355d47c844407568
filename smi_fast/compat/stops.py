"""The stops that the published loop takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smi_fast.schedules import Selection, Stop, StopSchedule


@dataclass(frozen=True)
class PublishedStops:
    """The schedule of ``prune_it`` and ``prune_ratio``, as the published loop reads them.

    In iteration t that loop first asks whether t + 1 is in ``prune_it``, and takes the stop at t
    only when it isn't. So it skips a stop that another one follows at once. A stop past the last
    iteration is never reached.

    >>> stops = PublishedStops.read([2, 3, 90], [0.5, 0.3, 0.3], iterations=8)
    >>> stops.at, sorted(stops.still)[:3], f"{stops.remaining:.3f}"
    ((3,), [1, 2, 3], '0.245')

    Attributes:
        taken: the stops that the loop takes.
        still: iterations without jitter: all in ``prune_it``, and the one before each.
        remaining: share of the tokens in the final mask. It counts every ratio, also that of a stop
            that isn't taken.
    """

    taken: StopSchedule
    still: frozenset[int]
    remaining: float

    @classmethod
    def read(
        cls, prune_it: Sequence[int], prune_ratio: Sequence[float], iterations: int
    ) -> PublishedStops:
        """The stops of a run.

        Raises:
            ValueError: a stop at 0, a stop without a ratio, or a ratio out of range.
        """
        its, ratios = list(prune_it), list(prune_ratio)
        taken = sorted({t for t in its if 0 <= t < iterations and t + 1 not in its})
        missing = [t for t in taken if its.index(t) >= len(ratios)]
        if missing:
            raise ValueError(f"expected a prune_ratio for the stop at {missing[0]}, got {ratios}")
        return cls(
            StopSchedule(tuple(taken), tuple(ratios[its.index(t)] for t in taken)),
            frozenset(t - before for t in its for before in (0, 1)),
            math.prod(1.0 - ratio for ratio in ratios),
        )

    @property
    def at(self) -> tuple[int, ...]:
        return self.taken.at

    def counts(self, patches: int) -> tuple[int, ...]:
        return self.taken.counts(patches)

    def select(self, stop: Stop) -> Selection:
        return self.taken.select(stop)
