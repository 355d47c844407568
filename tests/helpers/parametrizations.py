"""Parametrizations that the package doesn't have: neither moves pixels themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast import Parametrization
from smi_fast.teacher.space import ImageSpace


class Sigmoid(Parametrization):
    """A number for each pixel, whose sigmoid is the pixel in [0, 1]; bounded, to see the clamp."""

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        space = self.space
        shape = (batch, space.channels, space.height, space.width)
        return torch.randn(shape, generator=generator).to(space.mean)

    def images(self, parameters: Tensor) -> Tensor:
        return self.space.normalize(parameters.sigmoid())

    def bounds(self) -> tuple[Tensor, Tensor]:
        limit = torch.full_like(self.space.mean, 1.5)
        return -limit, limit


class Linear(Parametrization):
    """Few numbers [B, C, R], of which each pixel is a fixed sum: each one moves whole images."""

    rank = 10

    def bind(self, space: ImageSpace) -> Linear:
        bound = super().bind(space)
        generator = torch.Generator().manual_seed(9)
        shape = (self.rank, space.height * space.width)
        bound.basis = torch.randn(shape, generator=generator).to(space.mean)
        return bound

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        shape = (batch, self.space.channels, self.rank)
        return torch.randn(shape, generator=generator).to(self.space.mean)

    def images(self, parameters: Tensor) -> Tensor:
        return F.linear(parameters, self.basis.T).unflatten(
            2, (self.space.height, self.space.width)
        )
