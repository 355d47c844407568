"""Geometry of the grid of patches, shared by the specification, the kernels and the loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Neighbour offsets (rows, columns) of total variation: horizontal, vertical and the two diagonals.
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


def nearest_cells(shift: Tensor, patch_size: int) -> Tensor:
    """The shift in whole patches: pixels over ``patch_size``, rounded to the nearest, halves up."""
    return torch.div(2 * shift + patch_size, 2 * patch_size, rounding_mode="floor")


def window_indices(
    kept: Tensor, shift: Tensor, flip: Tensor, patch_size: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The source pixels of each kept patch under jitter, and the cell that shows them.

    Args:
        kept: int64 [B, K], patches of the un-jittered grid.
        shift: int64 [B, 2], pixels (rows, columns) that each image is rolled by.
        flip: bool [B], whether each rolled image is mirrored left to right.
        patch_size: side of a patch, in pixels.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        pixels int64 [B, K, P, P], flat positions in an image plane [H·W]; and cells int64 [B, K]
        of the jittered grid.
    """
    rows, columns = height // patch_size, width // patch_size
    down, right = shift.unsqueeze(2).unbind(1)
    mirrored = flip[:, None]
    row = (kept // columns + nearest_cells(down, patch_size)) % rows
    column = (kept % columns + nearest_cells(right, patch_size)) % columns
    inside = torch.arange(patch_size, device=kept.device)
    y = (row[..., None] * patch_size + inside - down[..., None]) % height
    # A mirrored patch reads its pixels from right to left.
    across = torch.where(mirrored, patch_size - 1 - inside, inside)[:, None]
    x = (column[..., None] * patch_size + across - right[..., None]) % width
    cells = row * columns + torch.where(mirrored, columns - 1 - column, column)
    return y[..., :, None] * width + x[..., None, :], cells


def patch_mask(kept: Tensor, rows: int, columns: int, lengths: Tensor | None = None) -> Tensor:
    """A mask bool [B, rows, columns], true at the patches kept int64 [B, K].

    With lengths int64 [B] only the first ones of each image count.
    """
    flat = torch.zeros(len(kept), rows * columns, dtype=torch.bool, device=kept.device)
    if lengths is None:
        return flat.scatter(1, kept, True).reshape(-1, rows, columns)
    return flat.scatter(1, kept, first(kept, lengths)).reshape(-1, rows, columns)


def first(kept: Tensor, lengths: Tensor) -> Tensor:
    """bool [B, K], which of kept [B, K] are among the first ``lengths`` int64 [B] of an image."""
    return torch.arange(kept.shape[1], device=kept.device) < lengths[:, None]


def neighbourhood_mean(scores: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores [B, K] of the patches kept, averaged over the 3 x 3 neighbourhood of each.

    Patches that aren't kept, and places outside of the grid (rows, columns), count as 0.
    """
    on_grid = scores.new_zeros(len(kept), grid[0] * grid[1]).scatter(1, kept, scores)
    averaged = F.avg_pool2d(on_grid.view(-1, 1, *grid), 3, stride=1, padding=1)
    return averaged.flatten(1).gather(1, kept)


def pixel_mask(kept: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """A mask bool [B, 1, height, width], true at the pixels of the patches kept int64 [B, K]."""
    return spread(patch_mask(kept, height // patch_size, width // patch_size), patch_size)


def spread(patches: Tensor, patch_size: int) -> Tensor:
    """A mask bool [B, 1, H, W] of pixels, from that of patches [B, rows, columns]."""
    return patches.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]


def widened(kept: Tensor, width: int, patches: int) -> Tensor:
    """The patches kept int64 [B, K], and other ones of the grid behind them: int64 [B, width].

    Args:
        kept: distinct patches of each image.
        width: from K.
        patches: of a whole image, at least ``width``.
    """
    there = torch.zeros(len(kept), patches, dtype=torch.bool, device=kept.device)
    # A stable sort leaves those that are not kept in front, ascending.
    others = there.scatter(1, kept, True).byte().argsort(dim=1, stable=True)
    return torch.cat([kept, others[:, : width - kept.shape[1]]], dim=1)
