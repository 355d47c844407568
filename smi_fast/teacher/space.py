"""The space of images that a teacher takes: size, and normalisation of each channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class ImageSpace:
    """Images [B, C, H, W] normalised by ``(pixels - mean) / std``, where pixels are in [0, 1].

    Attributes:
        channels: C.
        height: H in pixels.
        width: W in pixels.
        mean: [C], of the data type and on the device of the images.
        std: [C], likewise, above 0.
    """

    channels: int
    height: int
    width: int
    mean: Tensor
    std: Tensor

    @cached_property
    def low(self) -> Tensor:
        """[C], the normalised value of a black pixel."""
        return -self.mean / self.std

    @cached_property
    def high(self) -> Tensor:
        """[C], the normalised value of a white pixel."""
        return (1 - self.mean) / self.std

    def normalize(self, pixels: Tensor) -> Tensor:
        """Images of pixels [B, C, H, W] in [0, 1]."""
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalize(self, images: Tensor) -> Tensor:
        """Pixels [B, C, H, W] of images, cut to [0, 1]."""
        return (images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)
