"""Ragged keeping: in each image the fewest patches that hold a share of its importance."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from smi_fast.schedules.base import Selection, Stop, check_stops


@dataclass(frozen=True)
class MassSchedule:
    """Keeps in each image the fewest patches that hold a share of its importance.

    An image whose importance lies in few patches keeps few. So the images of a batch keep numbers
    of patches of their own: the first ``result.lengths[i]`` of ``result.kept[i]``, in ascending
    order, then other patches as padding, which get no gradient and don't move. A callback sees the
    same ``kept``. It takes a teacher whose head reads its class token, and objectives without taps.

    On the CPU the rows of all images are concatenated, so that padding costs the blocks
    nothing. Rotary positions and a GPU compute padded rows and mask them.

    >>> result = invert(teacher, [3, 7], schedule=MassSchedule(0.6, at=(5,)), iterations=20,
    ...                 progress=False)
    >>> torch.equal(result.masks.sum((1, 2)), result.lengths)
    True

    Args:
        mass: the share, in (0, 1]. Importance below 0 counts as 0.
        at: iterations of the stops, ascending from 1. A later stop drops from what is left.

    Raises:
        ValueError: mass out of range, or stops that don't ascend from 1.
    """

    mass: float
    at: tuple[int, ...]
    ragged = True

    def __post_init__(self) -> None:
        if not (isinstance(self.mass, Real) and 0 < self.mass <= 1):
            raise ValueError(f"expected mass in (0, 1], got {self.mass!r}")
        object.__setattr__(self, "at", check_stops(self.at))

    def counts(self, patches: int) -> tuple[int, ...]:
        return (patches,) * len(self.at)

    def select(self, stop: Stop) -> Selection:
        there = stop.counts()
        scores = torch.where(there, stop.importance.double().clamp(min=0), -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        sums = scores.gather(1, order).clamp(min=0).cumsum(dim=1)
        # The rounding of sums must not ask for one more patch.
        before = sums < self.mass * sums[:, -1:] * (1 - 1e-12)
        lengths = torch.minimum(before.sum(dim=1) + 1, there.sum(dim=1))
        width = int(lengths.max()) if len(lengths) else 1
        order = order[:, :width]
        # What stays comes first, both parts ascending.
        places = torch.arange(width, device=order.device).expand_as(order)
        patches = stop.kept.gather(1, order)
        behind = (places >= lengths[:, None]) * (stop.grid[0] * stop.grid[1])
        ascending = (patches + behind).argsort(dim=1)
        return Selection(patches.gather(1, ascending), lengths=lengths)
