"""Patch Rebirth Inversion's schedule: the most important patches leave as finished images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from smi_fast.schedules.base import Selection, Stop, check_stops

ORDERS = ("importance", "random", "radial")


@dataclass(frozen=True)
class PatchRebirth:
    """Splits each trajectory into v sparse images (Patch Rebirth Inversion, arXiv 2509.23235).

    At the stop ``t_k = k * (T // v)`` the N // v best of the patches that are left leave together
    as a finished sparse image, and the others go on. So T iterations of one trajectory give v
    images of its label, which share no patch: see
    :meth:`InversionResult.sparse_images <smi_fast.InversionResult.sparse_images>`.

    - The last group has no stop: it goes on to the end of the run. Where v doesn't divide T, that
      is up to v - 1 iterations past the published end, ``v * (T // v)``.
    - The images cover the grid where v divides N. Otherwise the last N mod v patches in the order
      of the first stop are dropped there, so that all images have as many patches.

    >>> schedule = PatchRebirth(v=4).bind(100)
    >>> schedule.at, schedule.counts(64)
    ((25, 50, 75), (48, 32, 16))

    Args:
        v: division factor, the number of images of a trajectory, from 2.
        at: iterations of the v - 1 stops, ascending, from 1; by default every T // v iterations.
        order: which patches leave first: "importance", the most important ones, as published;
            "random", ones that the run's generator draws; or "radial", those nearest to the centre.

    Raises:
        ValueError: v out of range, another order, or not v - 1 ascending stops.
    """

    v: int = 7
    at: tuple[int, ...] = ()
    order: str = "importance"

    def __post_init__(self) -> None:
        if not isinstance(self.v, Integral) or self.v < 2:
            raise ValueError(f"expected v, images of a trajectory, from 2, got {self.v!r}")
        if self.order not in ORDERS:
            raise ValueError(f"expected order {', '.join(ORDERS)}, got {self.order!r}")
        object.__setattr__(self, "at", check_stops(self.at))
        if self.at and len(self.at) != self.v - 1:
            raise ValueError(f"expected {self.v - 1} stops for v = {self.v}, got {self.at}")

    @property
    def images(self) -> int:
        """Sparse images of a trajectory."""
        return self.v

    def bind(self, iterations: int) -> PatchRebirth:
        """The schedule of a run of T iterations.

        Raises:
            ValueError: less than v iterations, or a stop past their end.
        """
        if not self.at:
            if iterations < self.v:
                raise ValueError(f"expected v = {self.v} or more iterations, got {iterations}")
            at = tuple(k * (iterations // self.v) for k in range(1, self.v))
            return replace(self, at=at)
        if self.at[-1] >= iterations:
            raise ValueError(
                f"expected stops before the end of {iterations} iterations, got {self.at}"
            )
        return self

    def counts(self, patches: int) -> tuple[int, ...]:
        if patches < self.v:
            raise ValueError(f"expected v of at most {patches}, the patches, got {self.v}")
        return tuple((self.v - k) * (patches // self.v) for k in range(1, self.v))

    def select(self, stop: Stop) -> Selection:
        groups = self.v - self.at.index(stop.iteration)
        size = stop.kept.shape[1] // groups
        order = self._scores(stop).argsort(dim=1, descending=True, stable=True)
        finished, kept = order[:, :size], order[:, size : groups * size]
        return Selection(
            stop.kept.gather(1, kept).sort(dim=1).values,
            stop.kept.gather(1, finished).sort(dim=1).values,
        )

    def _scores(self, stop: Stop) -> Tensor:
        """[B, K]; the highest leave first."""
        if self.order == "random":
            drawn = torch.rand(stop.kept.shape, generator=stop.generator, dtype=torch.float32)
            return drawn.to(stop.kept.device)
        if self.order == "radial":
            rows, columns = stop.grid
            down, right = stop.kept // columns, stop.kept % columns
            # Twice the distances from the centre, which are whole numbers.
            return -((2 * down - rows + 1) ** 2 + (2 * right - columns + 1) ** 2)
        return stop.importance
