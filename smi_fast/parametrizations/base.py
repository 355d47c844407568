"""The contract of a parametrization: what the optimiser moves, and how images come from it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
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
    Neither may read a tensor on the host, so that a step can be captured in a CUDA graph.

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
        """The first parameters, contiguous [B, C, ...], of the space's data type and device.

        Args:
            batch: B.
            generator: draws them, on the CPU; None for torch's own.
        """

    @abstractmethod
    def images(self, parameters: Tensor) -> Tensor:
        """Images [B, C, H, W] in normalised space, differentiable."""

    def lazy_images(self, parameters: Tensor) -> Tensor | SigmoidImages:
        """The images, or what they are computed from where they are read.

        The loop calls it. :class:`SigmoidParametrization` has images that are computed later.
        """
        return self.images(parameters)

    def parameters_of(self, images: Tensor) -> Tensor:
        """Parameters whose images are these [B, C, H, W]; a new tensor.

        Raises:
            ValueError: the parametrization can't be inverted.
        """
        raise ValueError(f"{type(self).__name__} can't start from given images: leave init out")

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest value [C] of the parameters of each channel; without limit here."""
        limit = torch.full_like(self.space.mean, torch.inf)
        return -limit, limit
