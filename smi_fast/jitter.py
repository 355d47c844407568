"""Jitter: a shift and a mirroring of the images, drawn anew in each iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.phases import for_phases

# Side of the image over the largest shift, as published (arXiv 2510.27186).
JITTER_SHARE = 8


@dataclass(frozen=True)
class Jitter:
    """How far images are shifted, and whether they are mirrored.

    In each iteration the shift along an axis is uniform in the whole pixels from ``-m`` to ``m``,
    where m is ``share`` of the side, rounded down. With a probability of one half the images are
    mirrored.

    >>> Jitter(share=30 / 224).draw(100, (224, 224))[0].abs().max() <= 30
    tensor(True)
    >>> off = Jitter(share=0, flip=False)

    Args:
        share: largest shift as a share of the side, in [0, 1], by default as published by SMI
            (arXiv 2510.27186); or one share for each phase between two stops.
        flip: whether images are mirrored at all.
        per_image: whether each image of a batch has a shift and a mirroring of its own.
        starts: with several shares, where each but the first begins, as shares of the run in
            (0, 1); by default at the schedule's stops.

    Raises:
        ValueError: a share or a start out of range, not one start for each share but the first, or
            flip or per_image that is neither True nor False.
    """

    share: float | tuple[float, ...] = 1 / JITTER_SHARE
    flip: bool = True
    per_image: bool = False
    starts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        shares = _numbers(self.share)
        if not shares or not all(isinstance(s, Real) and 0 <= float(s) <= 1 for s in shares):
            raise ValueError(
                "expected share, the largest shift over the side of the image, in [0, 1], "
                f"got {self.share!r}"
            )
        for name in ("flip", "per_image"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"expected {name} True or False, got {getattr(self, name)!r}")
        if isinstance(self.share, Sequence):
            object.__setattr__(self, "share", shares)
        if self.starts is None:
            return
        starts = _numbers(self.starts)
        inside = all(isinstance(s, Real) and 0 < float(s) < 1 for s in starts)
        if not inside or len(starts) + 1 != len(shares) or list(starts) != sorted(set(starts)):
            raise ValueError(
                "expected starts in (0, 1), ascending, one for each share but the first, "
                f"got {self.starts!r} for {len(shares)} shares"
            )
        object.__setattr__(self, "starts", starts)

    def draw(
        self,
        iterations: int,
        image_size: tuple[int, int],
        *,
        batch: int = 1,
        copies: int = 1,
        stops: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw the jitter of a run.

        Args:
            iterations: T.
            image_size: (height, width) in pixels.
            batch: B, which only ``per_image`` reads.
            copies: R, views of each image in an iteration.
            stops: iterations of the schedule's stops, ascending.
            generator: on the CPU; None for torch's own.

        Returns:
            shift int64 [T, 2] in pixels (rows, columns), and flip bool [T]; with ``per_image``
            [T, B, 2] and [T, B]. With more copies than one, R is the second axis.

        Raises:
            ValueError: not one share for each phase.
        """
        phases = self.phases(iterations, stops)
        each = ((copies,) if copies > 1 else ()) + ((batch,) if self.per_image else ())
        axes = []
        for side in image_size:
            limits = [(_pixels(share, side), length) for share, length in phases]
            drawn = [
                torch.randint(-m, m + 1, (length, *each), generator=generator)
                for m, length in limits
            ]
            axes.append(torch.cat(drawn))
        shift = torch.stack(axes, dim=-1)
        if not self.flip:
            return shift, torch.zeros(shift.shape[:-1], dtype=torch.bool)
        # The data type is named, so that the default one doesn't change what a seed draws.
        chance = torch.rand(shift.shape[:-1], generator=generator, dtype=torch.float32)
        return shift, chance < 0.5

    def phases(self, iterations: int, stops: Sequence[int]) -> list[tuple[float, int]]:
        """Each share, and the number of iterations that it is for.

        Raises:
            ValueError: not one share for each phase.
        """
        if not isinstance(self.share, tuple):
            return [(self.share, iterations)]
        inner = stops if self.starts is None else [round(s * iterations) for s in self.starts]
        return for_phases(self.share, "shares of jitter", iterations, inner)


def _numbers(given: object) -> tuple[Any, ...]:
    if isinstance(given, Real):
        return (given,)
    return tuple(given) if isinstance(given, Sequence) else ()


def _pixels(share: float, side: int) -> int:
    # 15 / 224 of 224 pixels are 15, whatever the rounding of the quotient.
    return int(share * side + 1e-6)


def jitter_images(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Jitter whole images, as the dense loop does, without a read by the host.

    Equal to::

        jittered = images.roll((shift[0], shift[1]), (2, 3))
        jittered = jittered.flip(3) if flip else jittered

    With a shift and a flip for each image, that holds for each image alone.

    Args:
        images: [B, C, H, W].
        shift: int64 [2], pixels (rows, columns) that all images are rolled by, or [B, 2] for each.
        flip: bool [], whether all images are mirrored left to right afterwards, or [B] for each.
    """
    height, width = images.shape[-2:]
    down, right = shift[..., 0, None], shift[..., 1, None]
    rows = (torch.arange(height, device=images.device) - down) % height
    columns = (torch.arange(width, device=images.device) - right) % width
    columns = torch.where(flip[..., None], columns.flip(-1), columns)
    jittered: Tensor = _Permute.apply(images, rows, columns)
    return jittered


class _Permute(torch.autograd.Function):
    """Reorders rows [H] or [B, H], and columns.

    The gradient reorders them back, which needs no scatter.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return _reordered(images, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = (order.argsort() for order in ctx.saved_tensors)
        return _reordered(grad, rows, columns), None, None


def _reordered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    if rows.dim() == 1:
        return images.index_select(2, rows).index_select(3, columns)
    down = rows[:, None, :, None].expand_as(images)
    return images.gather(2, down).gather(3, columns[:, None, None].expand_as(images))
