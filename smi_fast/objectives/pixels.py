"""Objectives that read the pixels: total variation in three forms, and the L2 norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.ops.grid import first, patch_mask
from smi_fast.ops.total_variation import NORMS, variation_norm

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT

# Pixel values of the batch that the published bounds of VariationTarget are for.
PUBLISHED_VALUES = 32 * 3 * 224 * 224


@dataclass(frozen=True)
class TotalVariation(Objective):
    """Mean of the images' total variations, or that of the whole batch as published.

    See :func:`smi_fast.ops.total_variation`. The gradient of one image then doesn't depend on the
    others; the norm of the whole batch grows with the root of its size.

    While the background is frozen, only differences with a pixel in an active patch count.

    >>> TotalVariation(weight=1e-3, norm="l1").name
    'total_variation_l1'

    Args:
        weight: factor; published for "l2" is 1e-4 (SMI, arXiv 2510.27186).
        norm: "l2", the sum of four Frobenius norms; or "l1", the sum of four mean absolute
            differences.
        per_image: True for the mean of the images' total variations; False for that of the whole
            batch, as in all published code.

    Raises:
        ValueError: another norm.
    """

    weight: float = 1e-4
    norm: str = "l2"
    per_image: bool = True
    reads_logits = False

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"expected norm l1 or l2, got {self.norm!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "total_variation" if self.norm == "l2" else "total_variation_l1"

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.per_image

    def __call__(self, inputs: LossInputs) -> Tensor:
        images, active = inputs.images, inputs.active
        if not self.per_image or len(images) == 1:
            return self._of(images, active, inputs)
        rows = [slice(i, i + 1) for i in range(len(images))]
        each = [
            self._of(images[row], None if active is None else active[row], inputs) for row in rows
        ]
        return torch.stack(each).mean() if each else images.sum()

    def _of(self, images: Tensor, active: Tensor | None, inputs: LossInputs) -> Tensor:
        size = inputs.teacher.patch_size
        return variation_norm(images, active, self.norm, patch_size=size, backend=inputs.backend)


@dataclass(frozen=True)
class L2Norm(Objective):
    """L2 norm of the normalised pixels.

    While the background is frozen, only pixels of active patches count.

    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=[CrossEntropy(), L2Norm()], **options).history)
    ['cross_entropy', 'l2_norm']

    Args:
        weight: factor; DeepInversion's is 1e-5 (arXiv 1912.08795).
        name: key of its values in the history.
        per_image: True for the mean of the images' norms, as in DeepInversion's code; False for the
            norm of the whole batch, as in SMI's (arXiv 2510.27186).
    """

    weight: float = 1e-5
    name: str = "l2_norm"
    per_image: bool = True
    reads_logits = False

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.per_image

    def __call__(self, inputs: LossInputs) -> Tensor:
        pixels = inputs.images
        if inputs.active is not None:
            # Made on the device, because numbers of the host would be copied in every iteration.
            shift, flip = inputs.active.new_zeros(2), inputs.active.new_zeros((), dtype=torch.bool)
            pixels, _ = ops.gather_patches(
                pixels,
                inputs.active if inputs.lengths is None else inputs.kept,
                shift,
                flip,
                patch_size=inputs.teacher.patch_size,
                backend=inputs.backend,
            )
            if inputs.lengths is not None:
                pixels = pixels * first(inputs.kept, inputs.lengths)[..., None]
        if not self.per_image:
            pixels = pixels[None]
        norms: Tensor = torch.linalg.vector_norm(pixels.flatten(1), dim=1)
        return norms.mean()


@dataclass(frozen=True)
class PatchSeamTV(Objective):
    """Norms of the differences across the seams between patches, summed over the seams.

    P is the side of a patch. Each k from 1 adds a seam between two rows of patches and one between
    two columns::

        torch.linalg.vector_norm(images[:, :, P * k] - images[:, :, P * k - 1])
        torch.linalg.vector_norm(images[:, :, :, P * k] - images[:, :, :, P * k - 1])

    Source: the patch prior of GradViT (arXiv 2203.11894), on images without jitter. The paper's
    weight could not be looked up; the default is that of total variation.

    While the background is frozen, only differences with a pixel in an active patch count.

    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=[CrossEntropy(), PatchSeamTV()], **options).history)
    ['cross_entropy', 'patch_seams']

    Args:
        weight: factor.
        name: key of its values in the history.
    """

    weight: float = 1e-4
    name: str = "patch_seams"
    reads_logits = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        images, size = inputs.images, inputs.teacher.patch_size
        rows = images[:, :, size::size] - images[:, :, size - 1 : -1 : size]
        columns = images[..., size::size] - images[..., size - 1 : -1 : size]
        if inputs.active is not None:
            grid = (images.shape[2] // size, images.shape[3] // size)
            mask = patch_mask(inputs.active, *grid)[:, None]
            below, beside = mask[:, :, 1:] | mask[:, :, :-1], mask[..., 1:] | mask[..., :-1]
            # Filled and not multiplied, because 0 times a frozen NaN is NaN.
            rows = rows.masked_fill(~below.repeat_interleave(size, dim=3), 0)
            columns = columns.masked_fill(~beside.repeat_interleave(size, dim=2), 0)
        row_norms: Tensor = torch.linalg.vector_norm(rows, dim=(0, 1, 3))
        column_norms: Tensor = torch.linalg.vector_norm(columns, dim=(0, 1, 2))
        return row_norms.sum() + column_norms.sum()


class VariationTarget(Objective):
    """Distance of the batch's total variation from a target that is drawn once for each batch.

    Equal to ``abs(total_variation(images)[1] - target)``, with the target uniform in [low, high].
    Source: PSAQ-ViT (arXiv 2203.02250). Its code has these bounds and this weight for 32 images of
    224 px, and measures the jittered images. Total variation grows with the root of the number of
    pixel values, so the target is scaled by that root for other batches and sizes.

    The target is for whole images: frozen patches count too.

    >>> objectives = [CrossEntropy(), VariationTarget()]
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=objectives, **options).history)
    ['cross_entropy', 'variation_target']

    Args:
        low: smallest target, for a batch of the published size; from 0.
        high: largest target, likewise.
        weight: factor.

    Raises:
        ValueError: bounds out of range.
    """

    name = "variation_target"
    reads_logits = False

    def __init__(self, low: float = 2500.0, high: float = 3000.0, weight: float = 0.05) -> None:
        if not 0 <= low <= high:
            raise ValueError(f"expected 0 <= low <= high, got {low} and {high}")
        self.low, self.high, self.weight = low, high, weight
        self._target: Tensor | None = None

    def __repr__(self) -> str:
        return f"VariationTarget(low={self.low}, high={self.high}, weight={self.weight})"

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        values = batch * teacher.channels * math.prod(teacher.image_size)
        share = torch.rand((), generator=generator, dtype=torch.float32)
        drawn = self.low + (self.high - self.low) * share
        self._target = (drawn * math.sqrt(values / PUBLISHED_VALUES)).to(teacher.device)

    def __call__(self, inputs: LossInputs) -> Tensor:
        if self._target is None:
            raise RuntimeError("begin() draws the target: call it before the first iteration")
        variation = variation_norm(inputs.images, None, "l2", patch_size=1, backend=inputs.backend)
        return (variation - self._target.to(variation.dtype)).abs()
