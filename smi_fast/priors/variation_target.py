"""PSAQ-ViT's term for smoothness: total variation near a random amount, not as little as can be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.objectives import Objective, Step
from smi_fast.teacher import SparseViT

# The published bounds are for so many pixel values.
PUBLISHED_VALUES = 32 * 3 * 224 * 224


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

    def __call__(self, step: Step) -> Tensor:
        if self._target is None:
            raise RuntimeError("begin() draws the target: call it before the first step")
        _, variation = ops.total_variation(step.images, backend=step.backend)
        return (variation - self._target.to(variation.dtype)).abs()
