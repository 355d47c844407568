"""MimiQ's objective: the heads of a block attend to similar shapes, as they do for real images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

# The usual constants of SSIM, for maps in [0, 1].
LUMINANCE, CONTRAST = 0.01**2, 0.03**2


class HeadSimilarity(Objective):
    """Dissimilarity of the attention maps of a block's heads, averaged over blocks.

    For each head and query patch, the attention scores for the patches are one map. The
    dissimilarity is :func:`head_dissimilarity`. Source: MimiQ (arXiv 2407.20021), inter-head
    attention similarity, with the numbers of its code: scores before the softmax, SSIM over the
    whole map, weight 1.

    The SSIM of a whole map doesn't depend on the order of its patches. So the maps have one value
    for each of the K kept patches, and only kept patches are queries.

    >>> HeadSimilarity(blocks=[0, -1]).taps(depth=12)
    ('attention.0.scores', 'attention.11.scores')

    Args:
        blocks: indices of blocks, from the end when negative; None for all, as published.
        weight: factor.
    """

    name = "head_similarity"
    reads_logits = False
    separable = True

    def __init__(self, blocks: Sequence[int] | None = None, weight: float = 1.0) -> None:
        self.blocks, self.weight = blocks, weight

    def __repr__(self) -> str:
        return f"HeadSimilarity(blocks={self.blocks}, weight={self.weight})"

    def taps(self, depth: int) -> tuple[str, ...]:
        return of_blocks("attention.{}.scores", self.blocks, depth)

    def __call__(self, inputs: LossInputs) -> Tensor:
        patches = slice(inputs.teacher.num_prefix_tokens, None)
        scores = (
            inputs.taps[name][:, :, patches, patches] for name in self.taps(inputs.teacher.depth)
        )
        return torch.stack([head_dissimilarity(block) for block in scores]).mean()


def head_dissimilarity(scores: Tensor) -> Tensor:
    """Mean of 1 - SSIM² over images, queries and all pairs of heads, each with itself included.

    Each map is scaled linearly to [0, 1]. With means, variances and covariances over its K values,
    the SSIM of heads i and j is::

        (2 * mean_i * mean_j + 0.01**2) * (2 * cov_ij + 0.03**2)
        / ((mean_i**2 + mean_j**2 + 0.01**2) * (var_i + var_j + 0.03**2))

    One matrix product for each query gives all pairs of heads, so no map of a pair is stored.

    Args:
        scores: [B, heads, N, K], of N queries and K keys.
    """
    maps = scores.transpose(1, 2)
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    maps = (maps - low) / (high - low + 1e-8)
    mean = maps.mean(-1, keepdim=True)
    centred = maps - mean
    covariance = centred @ centred.mT / maps.shape[-1]
    variance = covariance.diagonal(dim1=-2, dim2=-1)[..., None]
    squared = mean.square()
    alike = (2 * mean @ mean.mT + LUMINANCE) * (2 * covariance + CONTRAST)
    ssim = alike / ((squared + squared.mT + LUMINANCE) * (variance + variance.mT + CONTRAST))
    return (1 - ssim.square()).mean()
