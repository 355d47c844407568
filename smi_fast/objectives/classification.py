"""Objectives that read the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Mean cross-entropy of the logits against class indices or probabilities."""

    weight: float = 1.0
    name: str = "cross_entropy"

    def __call__(self, inputs: LossInputs) -> Tensor:
        return F.cross_entropy(inputs.logits, inputs.targets)


@dataclass(frozen=True)
class BinaryCrossEntropy(Objective):
    """Mean binary cross-entropy of each class by itself, for several classes in one image.

    Equal to ``F.binary_cross_entropy_with_logits(logits, targets)``; the targets are probabilities
    [B, classes] that needn't sum to one, see :func:`smi_fast.objectives.targets.multi_targets`.
    """

    weight: float = 1.0
    name: str = "binary_cross_entropy"

    def __call__(self, inputs: LossInputs) -> Tensor:
        if inputs.targets.shape != inputs.logits.shape:
            expected, got = list(inputs.logits.shape), list(inputs.targets.shape)
            raise ValueError(f"expected targets as probabilities {expected}, got {got}")
        return F.binary_cross_entropy_with_logits(inputs.logits, inputs.targets)
