"""The contract of a parametrization: what the optimiser moves, and how images come from it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smi_fast.teacher.sigmoid_images import SigmoidImages
    from smi_fast.teacher.space import ImageSpace

P = TypeVar("P", bound="Parametrization")


class Parametrization(ABC):
    """What the optimiser moves: one real tensor of parameters, from which images are computed.

    A class of your own implements :meth:`initial` and :meth:`images`; both may read ``self.space``.
    Neither may read a tensor on the host, so that an iteration can be captured in a CUDA graph.

    >>> class Blocks(Parametrization):
    ...     def initial(self, batch, generator):
    ...         space = self.space
    ...         shape = (batch, space.channels, space.height // 4, space.width // 4)
    ...         return torch.randn(shape, generator=generator).to(space.mean) / 50
    ...     def images(self, parameters):
    ...         u = torch.nn.functional.interpolate(parameters, scale_factor=4.0)
    ...         return self.space.normalize(torch.sigmoid(u))
    >>> invert(teacher, [7], parametrization=Blocks(), iterations=10, progress=False).images.shape
    torch.Size([1, 3, 64, 64])

    Attributes:
        space: of the images; set by :meth:`bind`.
        pixelwise: whether the parameters are the pixels themselves, [B, C, H, W]. The loop then
            moves only those of active patches. Otherwise it freezes the background by keeping the
            pixels of stopped patches as they were at their stop.
    """

    space: ImageSpace
    pixelwise = False

    def bind(self: P, space: ImageSpace) -> P:
        """A copy for images of one space. Override it to prepare constants for that space."""
        bound = copy.copy(self)
        object.__setattr__(bound, "space", space)  # members may be frozen dataclasses
        return bound

    @abstractmethod
    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """The first parameters, real [B, C, ...] of three or more axes, on the space's device.

        Args:
            batch: B.
            generator: draws them, on the CPU; None for torch's own.
        """

    @abstractmethod
    def images(self, parameters: Tensor) -> Tensor:
        """Images [B, C, H, W] in normalised space, differentiable; of the space's data type."""

    def lazy_images(self, parameters: Tensor) -> Tensor | SigmoidImages:
        """The images, or what they are computed from where they are read.

        The loop calls it. :class:`SigmoidParametrization` has images that are computed later.
        """
        return self.images(parameters)

    def parameters_of(self, images: Tensor) -> Tensor:
        """Parameters whose images are these [B, C, H, W].

        Raises:
            ValueError: the parametrization can't be inverted.
        """
        raise ValueError(f"{type(self).__name__} can't start from given images: leave init out")

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest value [C] of the parameters of each channel, on the space's device.

        Without limit here.
        """
        limit = torch.full_like(self.space.mean, torch.inf)
        return -limit, limit


def parameters_like(space: ImageSpace) -> Tensor:
    """An empty tensor of the data type and device of parameters that don't lose small moves.

    bfloat16 images come from float32: half precision has neither the transforms nor the digits that
    the moments of Adam need.
    """
    dtype = torch.promote_types(space.mean.dtype, torch.float32)
    return torch.empty(0, dtype=dtype, device=space.mean.device)


def check_start(start: float) -> None:
    """Check the standard deviation at the start.

    Raises:
        ValueError: it isn't a finite number above 0.
    """
    if not (isinstance(start, Real) and 0 < start < math.inf):
        raise ValueError(f"expected start above 0, got {start!r}")
