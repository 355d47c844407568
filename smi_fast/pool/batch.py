"""A batch on its way into a pool: what it must be, and its pixels as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_batch(images: Tensor, masks: Tensor, size: int) -> None:
    """Refuse tensors of another size than the records.

    Raises:
        ValueError: images that aren't floats [B, 3, H, W], or masks that aren't bool [B, rows,
            columns] whose rows and columns divide H and W.
    """
    if images.ndim != 4 or images.shape[:2] != (size, 3) or not images.is_floating_point():
        raise ValueError(
            f"expected images as floats [{size}, 3, H, W] for {size} records, "
            f"got {images.dtype} {list(images.shape)}"
        )
    if masks.ndim != 3 or len(masks) != size or masks.dtype != torch.bool:
        raise ValueError(
            f"expected masks as bool [{size}, rows, columns] for {size} records, "
            f"got {masks.dtype} {list(masks.shape)}"
        )
    grid = masks.shape[1:]
    if 0 in grid or any(side % count for side, count in zip(images.shape[2:], grid, strict=True)):
        raise ValueError(
            f"expected masks whose rows and columns divide images of {list(images.shape[2:])} "
            f"pixels, got {list(grid)}"
        )


def check_labels(records: Sequence[Mapping[str, Any]], classes: int) -> list[int]:
    """The labels of the records.

    Raises:
        ValueError: one is no class.
    """
    labels = [record.get("label") for record in records]
    for label in labels:
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"expected records with a label in 0..{classes - 1}, got {label!r}")
    return [label for label in labels if label is not None]


def to_uint8(images: Tensor) -> Any:
    """Pixels [B, 3, H, W] in [0, 1] as an array uint8 [B, H, W, 3]."""
    pixels = images.detach().cpu().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
