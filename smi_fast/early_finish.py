"""When an image is finished before the last iteration."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class EarlyFinish:
    """An image is finished when the teacher has been sure of it for some iterations in a row.

    It then leaves the batch. With ``max_batch`` the images that wait take its place, so the batch
    stays full. An image is never finished before the last stop of the schedule.

    >>> inverter = SparseInverter(teacher, finish=EarlyFinish(confidence=0.9), max_batch=2)
    >>> result = inverter.invert([1, 3, 5], progress=False)
    >>> result.ages.shape, bool((result.ages <= result.iterations).all())
    (torch.Size([3]), True)

    Args:
        confidence: the least probability of the (most probable) target, in (0, 1], of the jittered
            image as the teacher sees it; with copies, their mean.
        iterations: in how many iterations in a row, from 1.

    Raises:
        ValueError: one of them out of range.
    """

    confidence: float
    iterations: int = 20

    def __post_init__(self) -> None:
        if not (isinstance(self.confidence, Real) and 0 < self.confidence <= 1):
            raise ValueError(f"expected a confidence in (0, 1], got {self.confidence!r}")
        if not isinstance(self.iterations, Integral) or self.iterations < 1:
            raise ValueError(f"expected 1 or more iterations in a row, got {self.iterations!r}")
