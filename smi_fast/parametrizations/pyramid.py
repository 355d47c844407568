"""Images as the sigmoid of a sum of small images that are enlarged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.parametrizations.base import check_start, parameters_like
from smi_fast.parametrizations.sigmoid import SigmoidParametrization
from smi_fast.teacher.space import ImageSpace


@dataclass(frozen=True)
class Pyramid(SigmoidParametrization):
    """Pixels are ``sigmoid(u)``, where u is a sum of images of several sizes.

    The longer side of the smallest image has ``smallest`` pixels, each next one twice as many, and
    the last one is as large as u; the shorter side is in proportion. With one parameter for each
    of their pixels, equal to::

        u = sum(c[i] * torch.nn.functional.interpolate(small[i], (H, W), mode="bicubic")
                for i in range(len(small)))
        images = (torch.sigmoid(u) - mean) / std

    The constants c are chosen so that standard normal parameters give u a standard deviation of 1,
    to which each level contributes alike, whatever the size of the image. So one learning rate
    suits every size, as with :class:`Fourier`.

    >>> pyramid = Pyramid(smallest=8)
    >>> result = SparseInverter(teacher, parametrization=pyramid, lr=0.2, iterations=10,
    ...                         schedule=Dense()).invert([3], progress=False)

    Args:
        smallest: pixels of the longer side of the smallest image, from 1.
        start: standard deviation of u at the start; small ones start from nearly uniform grey.

    Raises:
        ValueError: smallest below 1, or larger than the images; start not above 0.
    """

    smallest: int = 4
    start: float = 0.02
    _levels: tuple[tuple[Tensor, Tensor], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.smallest, int) and self.smallest >= 1):
            raise ValueError(f"expected smallest as a whole number from 1, got {self.smallest!r}")
        check_start(self.start)

    def bind(self, space: ImageSpace) -> Pyramid:
        longer = max(space.height, space.width)
        if self.smallest > longer:
            raise ValueError(f"expected smallest up to {longer} pixels, got {self.smallest}")
        bound = super().bind(space)
        sides, like = _sides(self.smallest, longer), parameters_like(space)
        levels = []
        for side in sides:
            rows, columns = (
                _enlargement(max(1, round(full * side / longer)), full)
                for full in (space.height, space.width)
            )
            # The variances of the levels add up to 1.
            levels.append(((rows / len(sides) ** 0.5).to(like), columns.to(like)))
        object.__setattr__(bound, "_levels", tuple(levels))
        return bound

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        count = sum(rows.shape[1] * columns.shape[1] for rows, columns in self._levels)
        shape = (batch, self.space.channels, count)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return (noise * self.start).to(parameters_like(self.space))

    def field(self, parameters: Tensor) -> Tensor:
        sizes = [(rows.shape[1], columns.shape[1]) for rows, columns in self._levels]
        parts = parameters.split([height * width for height, width in sizes], dim=2)
        levels = [
            rows @ part.unflatten(2, size) @ columns.mT
            for part, size, (rows, columns) in zip(parts, sizes, self._levels, strict=True)
        ]
        return torch.stack(levels).sum(0)

    def parameters_of(self, images: Tensor) -> Tensor:
        rows, columns = self._levels[-1]
        u = self.field_of(images)
        # The matrices of the largest image are multiples of the identity; the other images are 0.
        full = (u / (rows[0, 0] * columns[0, 0])).flatten(2)
        smaller = sum(r.shape[1] * c.shape[1] for r, c in self._levels[:-1])
        return F.pad(full, (smaller, 0))


def _sides(smallest: int, longer: int) -> list[int]:
    """The longer side of each level, ascending; the last one is that of the images."""
    sides = [smallest]
    while 2 * sides[-1] < longer:
        sides.append(2 * sides[-1])
    return sides if sides[-1] == longer else [*sides, longer]


def _enlargement(small: int, large: int) -> Tensor:
    """Matrix [large, small] that enlarges an axis, such that standard normal values keep theirs."""
    identity = torch.eye(small, dtype=torch.float64)[None, None]
    enlarged = F.interpolate(identity, (large, small), mode="bicubic", align_corners=False)[0, 0]
    scaled: Tensor = enlarged / enlarged.square().sum(1).mean().sqrt()
    return scaled
