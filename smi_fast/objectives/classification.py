"""Objectives that read the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Mean cross-entropy of the logits against class indices or probabilities.

    Equal to ``F.cross_entropy(logits, targets)``.

    >>> objectives = [CrossEntropy(), TotalVariation(1e-3)]
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=objectives, **options).history)
    ['cross_entropy', 'total_variation']

    Args:
        weight: factor.
        name: key of its values in the history.
    """

    weight: float = 1.0
    name: str = "cross_entropy"

    def __call__(self, inputs: LossInputs) -> Tensor:
        return F.cross_entropy(inputs.logits, inputs.targets)


@dataclass(frozen=True)
class BinaryCrossEntropy(Objective):
    """Mean binary cross-entropy over images and classes, for several classes in one image.

    Equal to ``F.binary_cross_entropy_with_logits(logits, targets)``. The targets are a probability
    in [0, 1] for each class, [B, classes], see :func:`smi_fast.objectives.targets.multi_targets`.

    >>> wanted = targets.multi_targets(torch.tensor([[3, 5]]), classes=10)
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, wanted, objectives=[BinaryCrossEntropy()], **options).history)
    ['binary_cross_entropy']

    Args:
        weight: factor.
        name: key of its values in the history.

    Raises:
        ValueError: during an inversion, targets of another shape.
    """

    weight: float = 1.0
    name: str = "binary_cross_entropy"

    def __call__(self, inputs: LossInputs) -> Tensor:
        if inputs.targets.shape != inputs.logits.shape:
            expected, got = list(inputs.logits.shape), list(inputs.targets.shape)
            raise ValueError(f"expected targets as probabilities {expected}, got {got}")
        return F.binary_cross_entropy_with_logits(inputs.logits, inputs.targets)
