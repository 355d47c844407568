"""Targets other than one class: soft ones, and several at once."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_targets(
    labels: Tensor,
    classes: int,
    *,
    low: float = 5.0,
    high: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Probabilities from random logits of the wanted classes, for :class:`CrossEntropy`.

    Equal to the softmax of logits that are uniform in [low, high] at the wanted classes and 0
    elsewhere. Source: SARDFQ (arXiv 2412.16553), soft-label learning, with its bounds; what the
    other logits are isn't stated there.

    Args:
        labels: int64 [B], or [B, n] for n classes of each image.
        classes: of the teacher.
        low: least logit of a wanted class.
        high: greatest.
        generator: draws the logits, on the CPU.

    Returns:
        float32 [B, classes] on the device of the labels.

    Raises:
        ValueError: labels of another shape or type, or out of range.
    """
    labels = _checked(labels, classes)
    drawn = low + (high - low) * torch.rand(labels.shape, generator=generator)
    logits = torch.zeros(len(labels), classes, device=labels.device)
    return logits.scatter(1, labels, drawn.to(labels.device)).softmax(dim=1)


def multi_targets(labels: Tensor, classes: int) -> Tensor:
    """1 at each wanted class and 0 elsewhere, for :class:`BinaryCrossEntropy`.

    Args:
        labels: int64 [B, n], n classes of each image.
        classes: of the teacher.

    Returns:
        float32 [B, classes] on the device of the labels.

    Raises:
        ValueError: labels of another shape or type, or out of range.
    """
    labels = _checked(labels, classes)
    return torch.zeros(len(labels), classes, device=labels.device).scatter(1, labels, 1.0)


def _checked(labels: Tensor, classes: int) -> Tensor:
    if labels.dim() not in (1, 2) or labels.dtype != torch.int64:
        raise ValueError(
            f"expected labels int64 [B] or [B, n], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"expected labels in 0..{classes - 1}, got {labels.tolist()}")
    return labels if labels.dim() == 2 else labels[:, None]
