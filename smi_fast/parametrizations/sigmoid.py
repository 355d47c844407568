"""Parametrizations whose pixels are the sigmoid of a field."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from smi_fast.parametrizations.base import Parametrization, parameters_like
from smi_fast.teacher.sigmoid_images import SigmoidImages

# Pixels are kept this far from black and white when a given image is turned into parameters.
MARGIN = 1e-3


class SigmoidParametrization(Parametrization):
    """A parametrization whose pixels in [0, 1] are the sigmoid of a field.

    A class of your own implements :meth:`field` in place of :meth:`images`. The teacher then reads
    the kept patches out of the field in one pass, and whole images are computed only for objectives
    that read them.

    >>> class Plain(SigmoidParametrization):
    ...     def initial(self, batch, generator):
    ...         space = self.space
    ...         shape = (batch, space.channels, space.height, space.width)
    ...         return torch.randn(shape, generator=generator).to(space.mean)
    ...     def field(self, parameters):
    ...         return parameters
    """

    @abstractmethod
    def field(self, parameters: Tensor) -> Tensor:
        """The field [B, C, H, W], differentiable, of the space's data type or a finer one."""

    def images(self, parameters: Tensor) -> Tensor:
        return SigmoidImages(field=self.field(parameters), space=self.space).tensor()

    def lazy_images(self, parameters: Tensor) -> Tensor | SigmoidImages:
        if type(self).images is not SigmoidParametrization.images:
            return self.images(parameters)  # a subclass shows something else than the sigmoid
        images = SigmoidImages(field=self.field(parameters), space=self.space)
        # A teacher in half precision reads images that are rounded once, from a finer field.
        return images if images.field.dtype == self.space.mean.dtype else images.tensor()

    def field_of(self, images: Tensor) -> Tensor:
        """The field [B, C, H, W] of given images, whose pixels are cut to [MARGIN, 1 - MARGIN]."""
        pixels = self.space.denormalize(images.to(parameters_like(self.space)))
        return pixels.clamp(MARGIN, 1 - MARGIN).logit()
