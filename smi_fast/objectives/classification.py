"""Objectives that read the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.engine.loss import cross_entropy
from smi_fast.objectives.base import LossInputs, Objective

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Mean cross-entropy of the logits against class indices or probabilities.

    Equal to ``F.cross_entropy(logits, targets)``. The targets are class indices int64 [B], or
    probabilities [B, classes], whose rows needn't sum to 1.

    >>> objectives = [CrossEntropy(), TotalVariation(1e-3)]
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=objectives, **options).history)
    ['cross_entropy', 'total_variation']

    Args:
        weight: factor.
        name: key of its values in the history.

    Raises:
        ValueError: at the start of an inversion, other targets.
    """

    weight: float = 1.0
    name: str = "cross_entropy"
    separable = True

    def check_targets(self, targets: Tensor | None, teacher: SparseViT) -> None:
        _check_classes(self.name, targets, teacher.num_classes)

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.targets is not None
        return cross_entropy(inputs.logits, inputs.targets, inputs.backend)


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
        ValueError: at the start of an inversion, other targets.
    """

    weight: float = 1.0
    name: str = "binary_cross_entropy"
    separable = True

    def check_targets(self, targets: Tensor | None, teacher: SparseViT) -> None:
        expected = f"targets in [0, 1] [B, {teacher.num_classes}] for {self.name}"
        shape = None if targets is None else tuple(targets.shape[1:])
        if targets is None or not targets.is_floating_point() or shape != (teacher.num_classes,):
            raise ValueError(f"expected {expected}, got {_described(targets)}")
        if not ((targets >= 0) & (targets <= 1)).all():
            raise ValueError(f"expected {expected}, got some outside")

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.targets is not None
        return F.binary_cross_entropy_with_logits(inputs.logits, inputs.targets)


def _check_classes(name: str, targets: Tensor | None, classes: int) -> None:
    """Refuse what is neither class indices int64 [B] nor probabilities [B, classes].

    A row of probabilities needn't sum to 1, because it may want several classes.
    """
    if classes == 0:
        raise ValueError(
            f"expected a teacher with classes for {name}, got one with num_classes=0: pass "
            "objectives that read no targets"
        )
    if targets is not None and targets.dtype == torch.int64 and targets.dim() == 1:
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            raise ValueError(
                f"expected targets in 0..{classes - 1} for {name}, "
                f"got {int(targets.min())}..{int(targets.max())}"
            )
        return
    if targets is None or not targets.is_floating_point() or targets.shape[1:] != (classes,):
        raise ValueError(
            f"expected targets as whole numbers [B] or probabilities [B, {classes}] for {name}, "
            f"got {_described(targets)}"
        )
    if not (targets.isfinite() & (targets >= 0)).all():
        raise ValueError(
            f"expected targets as probabilities for {name}, got some below 0 or not finite"
        )
    if not targets.any(dim=1).all():
        row = int((~targets.any(dim=1)).nonzero()[0])
        raise ValueError(f"expected targets above 0 in each image, image {row} has none")


def _described(targets: Tensor | None) -> str:
    return "none" if targets is None else f"{targets.dtype} {list(targets.shape)}"
