"""The pixels themselves, as the published loops move them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.parametrizations.base import Parametrization


@dataclass(frozen=True)
class Pixels(Parametrization):
    """Normalised pixels that start as standard normal noise and are clamped after each iteration.

    >>> result = invert(teacher, [7], parametrization=Pixels(), lr=0.25, iterations=10,
    ...                 progress=False)

    Source: the published loop of SMI (arXiv 2510.27186), as in DeepInversion (arXiv 1912.08795).
    """

    pixelwise = True

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        space = self.space
        shape = (batch, space.channels, space.height, space.width)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return noise.to(space.mean.device, space.mean.dtype)

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    def parameters_of(self, images: Tensor) -> Tensor:
        return images.to(self.space.mean.dtype)

    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.space.low, self.space.high
