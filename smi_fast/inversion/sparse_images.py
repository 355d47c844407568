"""The sparse images of an inversion: one of each trajectory, or several where patches leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi_fast.background import Background, over
from smi_fast.ops.grid import patch_mask

if TYPE_CHECKING:
    from smi_fast.inversion.result import FinishedGroup


@dataclass(frozen=True, eq=False)
class SparseImages:
    """Sparse images [S]; those of one trajectory follow each other in the order of their age.

    Attributes:
        kept: int64 [S, K], the patches of each image, ascending.
        pixels: [S, K, C·P·P] in [0, 1], in the order of :func:`smi_fast.ops.gather_patches`.
        targets: those of each image's trajectory, [S, ...] or None.
        logits: [S, classes], the logits of the teacher for these patches alone, without jitter.
        trajectory: int64 [S], the index of each image's trajectory in the batch.
        age: int64 [S], iterations that the patches received.
        canvases: [B, C, H, W] in [0, 1], a whole image of each trajectory. Every patch is as it was
            when it was finished.
        grid: patches per side, (rows, columns).
    """

    kept: Tensor
    pixels: Tensor
    targets: Tensor | None
    logits: Tensor
    trajectory: Tensor
    age: Tensor
    canvases: Tensor
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def masks(self) -> Tensor:
        """bool [S, rows, columns], the patches of each image."""
        return patch_mask(self.kept, *self.grid)

    @property
    def confidence(self) -> Tensor:
        """[S], as :attr:`InversionResult.confidence <smi_fast.InversionResult.confidence>`."""
        return confidence(self.logits, self.targets)

    def over(self, background: Background = "mean") -> Tensor:
        """Pixels [S, C, H, W] in [0, 1]: the patches of each image over a background.

        Args:
            background: as of :meth:`InversionResult.over <smi_fast.InversionResult.over>`.

        Raises:
            ValueError: no background.
        """
        return over(self.canvases[self.trajectory], self.masks, background)


def confidence(logits: Tensor, targets: Tensor | None) -> Tensor:
    """The probability of the (most probable) target, [B].

    Args:
        logits: [B, classes].
        targets: of the images.

    Raises:
        ValueError: the targets are neither classes [B] nor probabilities [B, classes].
    """
    one_each = targets is not None and targets.dtype == torch.int64 and targets.dim() == 1
    if targets is None or not (one_each or targets.shape == logits.shape):
        got = "none" if targets is None else f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"expected targets that are classes or probabilities, got {got}")
    labels = targets if one_each else targets.argmax(1)
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


def collect(
    groups: tuple[FinishedGroup, ...],
    images: Tensor,
    grid: tuple[int, int],
    targets: Tensor | None,
    ages: Tensor,
) -> SparseImages:
    """The sparse images of v groups of patches, which have none in common.

    Args:
        groups: in the order of their age.
        images: [B, C, H, W] in [0, 1], as they were at the end.
        grid: patches per side, (rows, columns).
        targets: [B, ...] or None.
        ages: int64 [B], iterations that the last group of each image received.

    Raises:
        ValueError: the groups have different numbers of patches.
    """
    sizes = [group.patches.shape[1] for group in groups]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"expected groups of one size, got {', '.join(map(str, sizes))} patches: read "
            "finished and kept instead"
        )
    cells = to_patches(images, grid)
    for group in groups:
        cells = cells.scatter(1, group.patches[..., None].expand_as(group.pixels), group.pixels)
    batch, count = len(images), len(groups)
    left = [torch.full_like(ages, group.iteration) for group in groups[:-1]]
    return SparseImages(
        kept=_by_trajectory([group.patches for group in groups]),
        pixels=_by_trajectory([group.pixels for group in groups]),
        targets=None if targets is None else targets.repeat_interleave(count, dim=0),
        logits=_by_trajectory([group.logits for group in groups]),
        trajectory=torch.arange(batch, device=images.device).repeat_interleave(count),
        age=_by_trajectory([*left, ages]),
        canvases=to_images(cells, images.shape[1], grid),
        grid=grid,
    )


def _by_trajectory(tensors: list[Tensor]) -> Tensor:
    """Tensors [B, ...] as one [B·v, ...], in which the v rows of a trajectory follow each other."""
    return torch.stack(tensors, dim=1).flatten(0, 1)


def to_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] as patches [B, rows·columns, C·P·P]."""
    rows, columns = grid
    cells = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    patches: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches


def to_images(patches: Tensor, channels: int, grid: tuple[int, int]) -> Tensor:
    """Patches [B, rows·columns, C·P·P] as images [B, C, H, W]."""
    side = round((patches.shape[2] / channels) ** 0.5)
    cells = patches.unflatten(2, (channels, side, side)).unflatten(1, grid)
    images: Tensor = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return images
