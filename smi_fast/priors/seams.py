"""GradViT's patch prior: no jumps where patches meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.objectives import Objective, Step
from smi_fast.reference import patch_mask


@dataclass(frozen=True)
class PatchSeamTV(Objective):
    """Sum over the seams of the grid of the norm of the jump across each.

    With patches of P pixels the sum, for each k-th row and column of the grid but the first, of::

        torch.linalg.vector_norm(images[:, :, P * k] - images[:, :, P * k - 1])
        torch.linalg.vector_norm(images[:, :, :, P * k] - images[:, :, :, P * k - 1])

    each norm over batch, channels and the length of the seam. Source: GradViT (arXiv 2203.11894),
    the patch prior, of the images without jitter. The paper's weight could not be looked up, the
    default is that of total variation.

    While the background is frozen only jumps at kept patches count, on either side: the others are
    constant.

    Args:
        weight: factor.
    """

    weight: float = 1e-4
    name: str = "patch_seams"

    def __call__(self, step: Step) -> Tensor:
        images, size = step.images, step.patch_size
        rows = images[:, :, size::size] - images[:, :, size - 1 : -1 : size]
        columns = images[..., size::size] - images[..., size - 1 : -1 : size]
        if step.kept is not None:
            grid = (images.shape[2] // size, images.shape[3] // size)
            mask = patch_mask(step.kept, *grid)[:, None]
            below, beside = mask[:, :, 1:] | mask[:, :, :-1], mask[..., 1:] | mask[..., :-1]
            rows = rows * below.repeat_interleave(size, dim=3)
            columns = columns * beside.repeat_interleave(size, dim=2)
        of_rows: Tensor = torch.linalg.vector_norm(rows, dim=(0, 1, 3)).sum()
        of_columns: Tensor = torch.linalg.vector_norm(columns, dim=(0, 1, 2)).sum()
        return of_rows + of_columns
