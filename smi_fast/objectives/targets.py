"""Targets beyond one class for each image: soft targets, and several classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def soft_targets(
    labels: Tensor | Sequence[Any],
    classes: int,
    *,
    low: float = 5.0,
    high: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Soft targets: probabilities from random logits, for :class:`smi_fast.CrossEntropy`.

    The softmax of logits that are uniform in [low, high] at the wanted classes and 0 elsewhere.
    Source: soft-label learning of SARDFQ (arXiv 2412.16553), with its bounds. The paper doesn't say
    what the other logits are.

    >>> soft = targets.soft_targets(torch.tensor([3, 5]), classes=10)
    >>> soft.shape, soft.argmax(1).tolist()
    (torch.Size([2, 10]), [3, 5])

    Args:
        labels: int64 [B], or int64 [B, n] for n classes in each image; a tensor or lists.
        classes: number of the teacher's classes.
        low: smallest logit of a wanted class.
        high: largest logit of a wanted class.
        generator: draws the logits, on the CPU; None for torch's own.

    Returns:
        float32 [B, classes] on the device of the labels.

    Raises:
        ValueError: labels of another shape or type, or out of range.
    """
    labels = _checked(labels, classes)
    share = torch.rand(labels.shape, generator=generator, dtype=torch.float32)
    drawn = low + (high - low) * share
    logits = torch.zeros(len(labels), classes, dtype=torch.float32, device=labels.device)
    return logits.scatter(1, labels, drawn.to(labels.device)).softmax(dim=1)


def multi_targets(labels: Tensor | Sequence[Any], classes: int) -> Tensor:
    """Targets of several classes, for :class:`smi_fast.BinaryCrossEntropy`.

    They are 1 at each wanted class and 0 elsewhere.

    >>> targets.multi_targets(torch.tensor([[0, 2]]), classes=4)
    tensor([[1., 0., 1., 0.]])

    Args:
        labels: int64 [B, n], n classes in each image; a tensor or lists.
        classes: number of the teacher's classes.

    Returns:
        float32 [B, classes] on the device of the labels.

    Raises:
        ValueError: labels of another shape or type, or out of range.
    """
    labels = _checked(labels, classes)
    zeros = torch.zeros(len(labels), classes, dtype=torch.float32, device=labels.device)
    return zeros.scatter(1, labels, 1.0)


def _checked(labels: Tensor | Sequence[Any], classes: int) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.dim() not in (1, 2) or labels.dtype != torch.int64:
        raise ValueError(
            f"expected labels int64 [B] or [B, n], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"expected labels in 0..{classes - 1}, got {labels.tolist()}")
    return labels if labels.dim() == 2 else labels[:, None]
