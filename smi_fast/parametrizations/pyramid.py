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
    # The matrices that enlarge the rows of all smaller images, side by side, and their columns; the
    # image as large as u is only multiplied.
    _rows: Tensor = field(init=False, repr=False, compare=False)
    _columns: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)
    _sizes: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

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
        heights, widths = (
            [max(1, round(full * side / longer)) for side in sides]
            for full in (space.height, space.width)
        )
        rows = [_enlargement(height, space.height) for height in heights[:-1]]
        columns = [_enlargement(width, space.width).to(like) for width in widths[:-1]]
        # The variances of the levels add up to 1.
        scaled = torch.cat([torch.empty(space.height, 0), *rows], dim=1) / len(sides) ** 0.5
        object.__setattr__(bound, "_sizes", tuple(zip(heights, widths, strict=True)))
        object.__setattr__(bound, "_rows", scaled.to(like))
        object.__setattr__(bound, "_columns", tuple(columns))
        return bound

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        count = sum(height * width for height, width in self._sizes)
        shape = (batch, self.space.channels, count)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return (noise * self.start).to(parameters_like(self.space))

    def field(self, parameters: Tensor) -> Tensor:
        parts = parameters.split([height * width for height, width in self._sizes], dim=2)
        sized = zip(parts, self._sizes, strict=True)
        *smaller, full = [part.unflatten(2, size) for part, size in sized]
        u: Tensor = full / len(self._sizes) ** 0.5
        if smaller:
            wide = [part @ columns.mT for part, columns in zip(smaller, self._columns, strict=True)]
            u = u + self._rows @ torch.cat(wide, dim=2)
        return u

    def parameters_of(self, images: Tensor) -> Tensor:
        full = self.field_of(images).flatten(2) * len(self._sizes) ** 0.5
        smaller = sum(height * width for height, width in self._sizes[:-1])
        return F.pad(full, (smaller, 0))  # the smaller images are 0


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
