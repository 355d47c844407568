"""Objectives that read the pixels: total variation in three forms, and their norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.ops.grid import patch_mask

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT

# The published bounds are for so many pixel values.
PUBLISHED_VALUES = 32 * 3 * 224 * 224


@dataclass(frozen=True)
class TotalVariation(Objective):
    """Total variation of the whole batch, see :func:`smi_fast.ops.total_variation`.

    Args:
        weight: factor; the published l2 one is 1e-4 (arXiv 2510.27186).
        norm: "l2", the sum of four Frobenius norms, or "l1", of four mean absolute differences.

    Raises:
        ValueError: another norm.
    """

    weight: float = 1e-4
    norm: str = "l2"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"expected norm l1 or l2, got {self.norm!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "total_variation" if self.norm == "l2" else "total_variation_l1"

    def __call__(self, inputs: LossInputs) -> Tensor:
        l1, l2 = ops.total_variation(
            inputs.images,
            inputs.active,
            patch_size=inputs.teacher.patch_size,
            backend=inputs.backend,
        )
        return l1 if self.norm == "l1" else l2


@dataclass(frozen=True)
class L2Norm(Objective):
    """Norm of all pixels of the batch; of those in kept patches while the others are frozen.

    Args:
        weight: factor; DeepInversion's is 1e-5 (arXiv 1912.08795).
        per_image: the mean of the images' norms, as in DeepInversion's code; without it the norm
            of the batch, as in SMI's.
    """

    weight: float = 1e-5
    name: str = "l2_norm"
    per_image: bool = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        pixels = inputs.images
        if inputs.active is not None:
            # Made on the device: numbers of the host would be copied to it in every iteration.
            shift, flip = inputs.active.new_zeros(2), inputs.active.new_zeros((), dtype=torch.bool)
            pixels, _ = ops.gather_patches(
                pixels,
                inputs.active,
                shift,
                flip,
                patch_size=inputs.teacher.patch_size,
                backend=inputs.backend,
            )
        if not self.per_image:
            pixels = pixels[None]
        norms: Tensor = torch.linalg.vector_norm(pixels.flatten(1), dim=1)
        return norms.mean()


@dataclass(frozen=True)
class PatchSeamTV(Objective):
    """Sum over the seams of the grid of the norm of the jump across each.

    With patches of P pixels the sum, for each k-th row and column of the grid but the first, of::

        torch.linalg.vector_norm(images[:, :, P * k] - images[:, :, P * k - 1])
        torch.linalg.vector_norm(images[:, :, :, P * k] - images[:, :, :, P * k - 1])

    each norm over batch, channels and the length of the seam. Source: GradViT (arXiv 2203.11894),
    the patch prior, of the images without jitter. The paper's weight could not be looked up, the
    default is that of total variation.

    While the background is frozen only jumps at kept patches count, on either side: the others are
    constant.

    Args:
        weight: factor.
    """

    weight: float = 1e-4
    name: str = "patch_seams"

    def __call__(self, inputs: LossInputs) -> Tensor:
        images, size = inputs.images, inputs.teacher.patch_size
        rows = images[:, :, size::size] - images[:, :, size - 1 : -1 : size]
        columns = images[..., size::size] - images[..., size - 1 : -1 : size]
        if inputs.active is not None:
            grid = (images.shape[2] // size, images.shape[3] // size)
            mask = patch_mask(inputs.active, *grid)[:, None]
            below, beside = mask[:, :, 1:] | mask[:, :, :-1], mask[..., 1:] | mask[..., :-1]
            rows = rows * below.repeat_interleave(size, dim=3)
            columns = columns * beside.repeat_interleave(size, dim=2)
        of_rows: Tensor = torch.linalg.vector_norm(rows, dim=(0, 1, 3)).sum()
        of_columns: Tensor = torch.linalg.vector_norm(columns, dim=(0, 1, 2)).sum()
        return of_rows + of_columns


class VariationTarget(Objective):
    """Distance of the batch's total variation from an amount drawn once for each batch.

    Equal to ``abs(total_variation(images)[1] - target)`` with the target uniform in [low, high].
    Source: PSAQ-ViT (arXiv 2203.02250), whose code has 2500 to 3000 for 32 images of 224 px, at
    weight 0.05; it measures the jittered images. The norms grow with the root of the number of
    pixels, so other batches and sizes scale the bounds by that.

    It is the whole image whose variation is to reach the target: frozen patches count too.

    Args:
        low: least target, of a batch of the published size.
        high: greatest target.
        weight: factor.
    """

    name = "variation_target"

    def __init__(self, low: float = 2500.0, high: float = 3000.0, weight: float = 0.05) -> None:
        if not 0 <= low <= high:
            raise ValueError(f"expected 0 <= low <= high, got {low} and {high}")
        self.low, self.high, self.weight = low, high, weight
        self._target: Tensor | None = None

    def __repr__(self) -> str:
        return f"VariationTarget(low={self.low}, high={self.high}, weight={self.weight})"

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        values = batch * teacher.channels * math.prod(teacher.image_size)
        drawn = self.low + (self.high - self.low) * torch.rand((), generator=generator)
        self._target = (drawn * math.sqrt(values / PUBLISHED_VALUES)).to(teacher.device)

    def __call__(self, inputs: LossInputs) -> Tensor:
        if self._target is None:
            raise RuntimeError("begin() draws the target: call it before the first iteration")
        _, variation = ops.total_variation(inputs.images, backend=inputs.backend)
        return (variation - self._target.to(variation.dtype)).abs()
