"""Parametrizations that the package doesn't have, and what tests read of those that it has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast import Parametrization
from smi_fast.teacher.space import ImageSpace

SIZES = [(64, 64), (112, 112), (224, 224), (384, 384), (33, 48), (48, 33), (7, 9)]


def space(height: int, width: int, dtype: torch.dtype = torch.float64) -> ImageSpace:
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]], dtype=dtype)
    return ImageSpace(3, height, width, mean, std)


def logits_of_pixels(parametrization: Parametrization, parameters: Tensor) -> Tensor:
    """u, of which the pixels in [0, 1] are the sigmoid."""
    return parametrization.space.denormalize(parametrization.images(parameters)).logit()


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
