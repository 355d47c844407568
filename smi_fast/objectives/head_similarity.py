"""MimiQ's prior: for a real image the heads of a block attend to similar shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

# The usual constants of SSIM, for maps in [0, 1].
LUMINANCE, CONTRAST = 0.01**2, 0.03**2


class HeadSimilarity(Objective):
    """How unlike the attention maps of a block's heads are, mean over blocks.

    Each patch's scores towards the patches, as a query, make one map of each head; see
    :func:`head_dissimilarity` for the rest. Source: MimiQ (arXiv 2407.20021), the inter-head
    attention similarity, with the numbers of its code: scores before the softmax, SSIM over the
    whole map, weight 1.

    The SSIM of a whole map doesn't depend on the order of its patches. So with kept patches the
    maps have K pixels, and only kept patches are queries.

    Args:
        blocks: from 0, or from the end when negative; None for all, as published.
        weight: factor.
    """

    name = "head_similarity"

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
        return torch.stack([head_dissimilarity(of_block) for of_block in scores]).mean()


def head_dissimilarity(scores: Tensor) -> Tensor:
    """Mean of 1 - SSIM² over all pairs of heads, each with itself included, queries and images.

    With each map brought to [0, 1] by its least and greatest score, and means, variances and
    covariances over its K pixels, the SSIM of heads i and j is::

        (2 * mean_i * mean_j + 0.01**2) * (2 * cov_ij + 0.03**2)
        / ((mean_i**2 + mean_j**2 + 0.01**2) * (var_i + var_j + 0.03**2))

    All pairs of heads come from one matrix product a query; no map of a pair is ever held.

    Args:
        scores: [B, heads, N, K].
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
