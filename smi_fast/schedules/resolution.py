"""Images that grow: the first iterations compute fewer patches of smaller images."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch

from smi_fast.schedules.base import Selection, Stop, check_stops


@dataclass(frozen=True)
class ResolutionSchedule:
    """Starts with smaller images, which have fewer patches of the same size, and enlarges them.

    At each stop images grow to the next size (bilinearly), and the parametrization turns them into
    parameters again. The teacher of a smaller size has the same weights; its position embeddings
    are resampled as timm does. Adam and the objectives begin anew at each stop. So the run equals
    one inversion after another, each started from the enlarged images of the one before.

    >>> schedule = ResolutionSchedule((32, 64), at=(25,), keep=0.5)
    >>> result = invert(teacher, [7], schedule=schedule, iterations=50, progress=False)
    >>> [phase.patches for phase in result.timing], result.images.shape
    ([16, 32], torch.Size([1, 3, 64, 64]))

    Args:
        sizes: pixels of the longer side, ascending; the last one is the teacher's. The shorter side
            is in proportion, and the patch size divides both sides.
        at: iterations of the stops, ascending from 1, one fewer than sizes.
        keep: share of the patches that stay after the last stop, in (0, 1]: the most important
            ones, by the importance of the smaller patch that each is a part of.

    Raises:
        ValueError: sizes that don't ascend, not one stop fewer, or keep out of range.
    """

    sizes: tuple[int, ...]
    at: tuple[int, ...]
    keep: float = 1.0

    def __post_init__(self) -> None:
        try:
            sizes = tuple(self.sizes)
        except TypeError:
            sizes = ()
        whole = all(isinstance(size, Integral) and size >= 1 for size in sizes)
        if len(sizes) < 2 or not whole or list(sizes) != sorted(set(sizes)):
            raise ValueError(
                f"expected two or more sizes in pixels that ascend, (112, 224), got {self.sizes!r}"
            )
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "at", check_stops(self.at))
        if len(self.at) != len(sizes) - 1:
            raise ValueError(f"expected {len(sizes) - 1} stops for sizes {sizes}, got {self.at}")
        if not (isinstance(self.keep, Real) and 0 < self.keep <= 1):
            raise ValueError(f"expected keep in (0, 1], got {self.keep!r}")

    def image_sizes(self, image_size: tuple[int, int]) -> tuple[tuple[float, float], ...]:
        height, width = image_size
        return tuple(
            (height * size / max(image_size), width * size / max(image_size)) for size in self.sizes
        )

    def counts(self, patches: int) -> tuple[int, ...]:
        *grown, last = (patches * size**2 // self.sizes[-1] ** 2 for size in self.sizes[1:])
        return (*grown, max(1, int(last * self.keep)))

    def select(self, stop: Stop) -> Selection:
        index = self.at.index(stop.iteration)
        before, after = self.sizes[index : index + 2]
        rows, columns = (
            torch.arange(cells * after // before, device=stop.kept.device) * before // after
            for cells in stop.grid
        )
        # Every patch was kept until now, so importance has the order of the grid.
        on_grid = stop.importance.unflatten(1, stop.grid)
        importance = on_grid[:, rows[:, None], columns].flatten(1)
        total = importance.shape[1]
        count = total if index + 1 < len(self.at) else max(1, int(total * self.keep))
        if count == total:
            return Selection(
                torch.arange(total, device=stop.kept.device).expand(len(stop.kept), -1)
            )
        # The parts of a patch tie, and topk leaves open which of them stay; here the first ones do.
        order = importance.argsort(dim=1, descending=True, stable=True)
        return Selection(order[:, :count].sort(dim=1).values)
