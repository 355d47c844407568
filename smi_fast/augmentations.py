"""Augmentations: what changes the images before the teacher sees them, anew in each iteration.

An augmentation is a differentiable function of normalised images, ``SparseInverter(augment=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

Augment = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""``augment(images, progress, generator) -> images``.

The images [B, C, H, W] are normalised and not jittered, and stay as they are. What is returned has
the same shape, data type and device, and a gradient. ``progress`` [] is the share of the run that
is done, in [0, 1). Random numbers come from ``generator``, which is on the images' device. The
function must not read a tensor on the host, so that an iteration can be captured in a CUDA graph.
"""


@dataclass(frozen=True)
class GaussianNoise:
    """Adds normal noise whose standard deviation changes linearly during the run.

    >>> noise = GaussianNoise(start=0.2)
    >>> noise(torch.zeros(2, 3, 8, 8), torch.tensor(0.5), torch.Generator()).std() < 0.15
    tensor(True)

    Args:
        start: standard deviation at the beginning, in normalised space; from 0.
        end: standard deviation at the end, likewise.

    Raises:
        ValueError: one of them below 0 or not finite.
    """

    start: float = 0.2
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(
            images.shape, generator=generator, dtype=images.dtype, device=images.device
        )
        return images + _linear(self.start, self.end, progress).to(images.dtype) * noise


@dataclass(frozen=True)
class ColourShift:
    """Adds a random number to each channel of each image.

    >>> shift = ColourShift(amount=0.1)
    >>> moved = shift(torch.zeros(2, 3, 8, 8), torch.tensor(0.0), torch.Generator())
    >>> moved.abs().max() <= 0.1, torch.equal(moved[..., :1, :1].expand_as(moved), moved)
    (tensor(True), True)

    Args:
        amount: the numbers are uniform between ``-amount`` and ``amount``, in normalised space;
            from 0.

    Raises:
        ValueError: amount below 0 or not finite.
    """

    amount: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "amount")

    def __call__(self, images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        chance = torch.rand(
            (*images.shape[:2], 1, 1), generator=generator, dtype=images.dtype, device=images.device
        )
        return images + self.amount * (2 * chance - 1)


@dataclass(frozen=True)
class LowPass:
    """Blurs with a Gaussian whose standard deviation changes linearly during the run.

    The blur wraps around the edges, as jitter does. Equal to a multiplication of the Fourier
    transform by ``exp(-2 * pi**2 * deviation**2 * frequency**2)``, where the frequency is in cycles
    per pixel.

    >>> blurred = LowPass(start=2.0)(
    ...     torch.randn(2, 3, 8, 8), torch.tensor(0.0), torch.Generator()
    ... )
    >>> blurred.std() < 0.5
    tensor(True)

    Args:
        start: standard deviation at the beginning, in pixels; from 0.
        end: standard deviation at the end, likewise.

    Raises:
        ValueError: one of them below 0 or not finite.
    """

    start: float = 2.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        # The transform has no half precision.
        dtype = torch.promote_types(images.dtype, torch.float32)
        options = {"dtype": dtype, "device": images.device}
        rows = torch.fft.fftfreq(height, **options)
        columns = torch.fft.rfftfreq(width, **options)
        squared = rows[:, None].square() + columns.square()
        deviation = _linear(self.start, self.end, progress).to(dtype)
        gain = torch.exp(-2 * math.pi**2 * deviation.square() * squared)
        spectrum = torch.fft.rfft2(images.to(dtype)) * gain
        blurred: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
        return blurred.to(images.dtype)


def name_of(augment: Augment) -> str:
    """What a message calls an augmentation."""
    return getattr(augment, "__name__", type(augment).__name__)


def apply(augment: Augment, images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
    """The augmented images, which have the shape, data type and device of the images [B, C, H, W].

    Raises:
        ValueError: the augmentation returns anything else, or images without a gradient.
    """
    seen = augment(images, progress, generator)
    if not isinstance(seen, Tensor):
        raise ValueError(
            f"expected augment {name_of(augment)} to return a tensor, got {type(seen).__name__}"
        )
    for kind in ("shape", "dtype", "device"):
        before, after = getattr(images, kind), getattr(seen, kind)
        if before != after:
            before, after = (list(x) if kind == "shape" else x for x in (before, after))
            raise ValueError(
                f"expected augment {name_of(augment)} to keep the {kind} {before} of images, "
                f"got {after}"
            )
    if images.requires_grad and not seen.requires_grad:
        raise ValueError(
            f"expected augment {name_of(augment)} to be differentiable, its gradient was cut off"
        )
    return seen


def _linear(start: float, end: float, progress: Tensor) -> Tensor:
    return start + (end - start) * progress


def _check(augmentation: object, *names: str) -> None:
    for name in names:
        value = getattr(augmentation, name)
        if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise ValueError(f"expected {name} from 0, got {value!r}")
