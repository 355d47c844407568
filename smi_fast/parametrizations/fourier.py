"""Images as the sigmoid of a Fourier series whose low frequencies move fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from smi_fast.parametrizations.base import check_start, parameters_like
from smi_fast.parametrizations.sigmoid import SigmoidParametrization
from smi_fast.teacher.space import ImageSpace

# Square root of the covariance of colours (red, green, blue) in ImageNet, as published with
# "Feature Visualization" (Olah et al., Distill, 2017); scaled below, so that it keeps the contrast.
COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


@dataclass(frozen=True)
class Fourier(SigmoidParametrization):
    """Pixels are ``sigmoid(u)``, where u is the inverse Fourier transform of scaled parameters.

    With z [B, C, H, W // 2 + 1] complex, stored as its real and imaginary parts, equal to::

        s = frequency.clamp(min=max(flat_below, 1 / max(H, W))) ** -decay
        v = torch.fft.irfft2(c * s * z, s=(H, W), norm="ortho")
        u = torch.einsum("ij,bjhw->bihw", colours, v)
        images = (torch.sigmoid(u) - mean) / std

    where the frequency is in cycles per pixel, and the constant c is chosen so that standard normal
    parameters give v a standard deviation of 1, whatever the size of the image and the decay. The
    colours are the principal ones of photographs, scaled so that u has the standard deviation of v;
    without ``colour``, u is v. An iteration of Adam moves each parameter by about ``lr``, and so
    the contrast of u by about ``lr``: one learning rate suits every size.

    Source: the scaling by frequency and the colours are from "Feature Visualization" (Olah et al.,
    Distill, 2017). The normalisation, the quiet start, the default decay and the frequency below
    which the scale is flat were chosen by measurement.

    >>> fourier = Fourier(decay=1.5)
    >>> result = SparseInverter(teacher, parametrization=fourier, lr=0.12, iterations=10,
    ...                         schedule=Dense()).invert([3], progress=False)

    Args:
        decay: exponent of 1/frequency, at least 0; 0 moves all frequencies alike.
        start: standard deviation of u at the start; small ones start from nearly uniform grey.
        colour: whether parameters move the principal colours of photographs instead of red, green
            and blue; by default they do in images of three channels.
        flat_below: frequency in cycles per pixel below which all frequencies move alike, in
            [0, 1]. Large images have lower frequencies than small ones; without this bound most of
            their contrast goes into shapes that are larger than any object.

    Raises:
        ValueError: decay below 0, start not above 0, flat_below out of [0, 1], or ``colour=True``
            for images that don't have three channels.
    """

    decay: float = 1.5
    start: float = 0.02
    colour: bool | None = None
    flat_below: float = 1 / 64
    _scale: Tensor = field(init=False, repr=False, compare=False)
    _colours: Tensor | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not (isinstance(self.decay, Real) and 0 <= self.decay < math.inf):
            raise ValueError(f"expected decay 0 or above, got {self.decay!r}")
        if self.colour not in (True, False, None):
            raise ValueError(f"expected colour True, False or None, got {self.colour!r}")
        if not (isinstance(self.flat_below, Real) and 0 <= self.flat_below <= 1):
            raise ValueError(f"expected flat_below in [0, 1], got {self.flat_below!r}")
        check_start(self.start)

    def bind(self, space: ImageSpace) -> Fourier:
        if self.colour and space.channels != 3:
            raise ValueError(f"expected images of 3 channels with colour, got {space.channels}")
        bound = super().bind(space)
        mixed = space.channels == 3 if self.colour is None else self.colour
        scale = _frequency_scale(space, self.decay, self.flat_below)
        object.__setattr__(bound, "_scale", scale)
        object.__setattr__(bound, "_colours", _colours(space) if mixed else None)
        return bound

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        shape = (batch, self.space.channels, *self._scale.shape, 2)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return (noise * self.start).to(self._scale)

    def field(self, parameters: Tensor) -> Tensor:
        space = self.space
        spectrum = torch.view_as_complex(parameters) * self._scale
        if not len(parameters):  # the transform takes no empty batch
            return spectrum.real[..., :1, :1].expand(-1, -1, space.height, space.width)
        u: Tensor = torch.fft.irfft2(spectrum, s=(space.height, space.width), norm="ortho")
        if self._colours is not None:
            # One product for each image: einsum would copy the channels to the end and back.
            u = (self._colours @ u.flatten(2)).view_as(u)
        return u

    def parameters_of(self, images: Tensor) -> Tensor:
        u = self.field_of(images)
        if self._colours is not None:
            u = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(self._colours), u)
        return torch.view_as_real(torch.fft.rfft2(u, norm="ortho") / self._scale)


def _frequency_scale(space: ImageSpace, decay: float, flat_below: float) -> Tensor:
    """[H, W // 2 + 1], what each coefficient is multiplied by."""
    rows = torch.fft.fftfreq(space.height, dtype=torch.float64)
    columns = torch.fft.fftfreq(space.width, dtype=torch.float64)
    # The mean of an image has frequency 0, and moves like the lowest frequency beside it.
    lowest = max(flat_below, 1 / max(space.height, space.width))
    frequency = torch.hypot(rows[:, None], columns).clamp(min=lowest)
    scale = (frequency**-decay)[:, : space.width // 2 + 1]
    # The variance that each coefficient, with parts of variance 1, adds to HW pixels: a conjugate
    # pair adds 4, but irfft2 reads only the Hermitian half of the columns that are their own pair.
    variance = torch.full((scale.shape[1],), 4.0, dtype=torch.float64)
    variance[0] = 1
    if space.width % 2 == 0:
        variance[-1] = 1
    pixels = space.height * space.width
    scale = scale / ((scale.square() * variance).sum() / pixels).sqrt()
    normalized: Tensor = scale.to(parameters_like(space))
    return normalized


def _colours(space: ImageSpace) -> Tensor:
    colours = torch.tensor(COLOURS, dtype=torch.float64)
    # Channels of standard deviation 1 keep it, on the average over the channels.
    keeping: Tensor = (colours * (3**0.5 / colours.norm())).to(parameters_like(space))
    return keeping
