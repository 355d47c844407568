"""What a picture shows in place of the patches that are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

Background: TypeAlias = str | Sequence[float]
NAMES = ("mean", "blurred", "black")
# The weight of the mean colour where the blur has no weight left, many patches from any kept one.
FLOOR = 1e-6


def check_background(background: Background) -> None:
    """Refuse what is no background.

    Raises:
        ValueError: another name, or a colour that isn't numbers in [0, 1].
    """
    if isinstance(background, str):
        known = background in NAMES
    else:
        known = isinstance(background, Sequence) and all(
            isinstance(value, Real) and 0 <= value <= 1 for value in background
        )
    if not known:
        raise ValueError(
            f"expected a background {', '.join(NAMES)} or a colour (r, g, b) in [0, 1], "
            f"got {background!r}"
        )


def over(pixels: Tensor, masks: Tensor, background: Background) -> Tensor:
    """Pixels whose patches outside ``masks`` are those of a background.

    With ``inside`` bool [B, 1, H, W], the pixels of the masks, it equals::

        torch.where(inside, pixels, background)

    where "mean" is ``(pixels * inside).sum((2, 3)) / inside.sum((2, 3))``, and "blurred" the same
    sums over a Gaussian window around each pixel, whose standard deviation is the side of a patch.
    So both come from the kept patches alone.

    Args:
        pixels: [B, C, H, W] in [0, 1].
        masks: bool [B, rows, columns]; H and W are multiples of these. An image without a patch
            gets black in place of its mean.
        background: "mean", "blurred", "black", or a colour of C numbers in [0, 1].

    Raises:
        ValueError: no background, or a colour of another number of channels.
    """
    check_background(background)
    sides = (pixels.shape[2] // masks.shape[1], pixels.shape[3] // masks.shape[2])
    inside = masks.repeat_interleave(sides[0], 1).repeat_interleave(sides[1], 2)[:, None]
    return torch.where(inside, pixels, _pixels(pixels, inside, sides, background).to(pixels.dtype))


def _pixels(
    pixels: Tensor, inside: Tensor, sides: tuple[int, int], background: Background
) -> Tensor:
    """The background, of a shape that broadcasts to that of ``pixels``."""
    if background == "black":
        background = (0.0,) * pixels.shape[1]
    if not isinstance(background, str):
        if len(background) != pixels.shape[1]:
            raise ValueError(
                f"expected a background colour of {pixels.shape[1]} channels, got {background!r}"
            )
        return torch.tensor(background, device=pixels.device)[:, None, None]
    # Half precision has too few digits for sums over an image.
    shown = (pixels * inside).to(torch.promote_types(pixels.dtype, torch.float32))
    weight = inside.to(shown.dtype)
    mean = shown.sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp(min=1)
    if background == "mean":
        return mean
    down, right = (
        _blur(size, side, weight) for size, side in zip(pixels.shape[2:], sides, strict=True)
    )
    return (down @ shown @ right + FLOOR * mean) / (down @ weight @ right + FLOOR)


def _blur(size: int, side: int, like: Tensor) -> Tensor:
    """A symmetric matrix [size, size] that blurs with a Gaussian of deviation ``side``."""
    place = torch.arange(size, dtype=like.dtype, device=like.device) / side
    return (-(place[:, None] - place).square() / 2).exp()
