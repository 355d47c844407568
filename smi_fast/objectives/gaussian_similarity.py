"""MaskAQ's patch-similarity entropy: in closed form for a Gaussian, on a sample of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT


class GaussianSimilarity(Objective):
    """Negative entropy of the patches' similarities, as if these had a Gaussian distribution.

    The features of a patch are its attention scores for the patches, averaged over heads. ``rows``
    patches of each image are sampled. The entropy is :func:`gaussian_entropy`, averaged over
    blocks. Source: MaskAQ (arXiv 2606.04373), with the numbers of its code.

    The published code draws a new sample in every iteration. Here a random order of the patches is
    drawn once for each image, and each iteration takes the next ``rows`` patches in that order.
    When fewer than ``rows`` patches are kept, it takes all of them.

    >>> GaussianSimilarity(blocks=[0, -1]).taps(depth=12)
    ('attention.0.scores', 'attention.11.scores')

    Args:
        blocks: indices of blocks, from the end when negative; None for all, as published.
        rows: number of sampled patches of each image, from 2.
        weight: factor.

    Raises:
        ValueError: rows out of range.
    """

    name = "gaussian_similarity"
    reads_logits = False
    separable = True
    reads_iteration = True

    def __init__(
        self, blocks: Sequence[int] | None = None, rows: int = 64, weight: float = 1.0
    ) -> None:
        if rows < 2:
            raise ValueError(f"expected 2 rows or more, got {rows}")
        self.blocks, self.rows, self.weight = blocks, rows, weight
        self._rank: Tensor | None = None

    def __repr__(self) -> str:
        return f"GaussianSimilarity(blocks={self.blocks}, rows={self.rows}, weight={self.weight})"

    def taps(self, depth: int) -> tuple[str, ...]:
        return of_blocks("attention.{}.scores", self.blocks, depth)

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        rank = torch.rand(batch, teacher.num_patches, generator=generator, dtype=torch.float32)
        self._rank = rank.to(teacher.device)

    def __call__(self, inputs: LossInputs) -> Tensor:
        entropies = []
        picked: Tensor | None = None
        for name in self.taps(inputs.teacher.depth):
            scores = inputs.taps[name][
                :, :, inputs.teacher.num_prefix_tokens :, inputs.teacher.num_prefix_tokens :
            ].mean(1)
            if picked is None:
                rows = self._pick(scores.shape[1], inputs)
                picked = rows[..., None].expand(-1, -1, scores.shape[2])
            entropies.append(gaussian_entropy(scores.gather(1, picked)))
        return -torch.stack(entropies).mean()

    def _pick(self, kept: int, inputs: LossInputs) -> Tensor:
        """The patches int64 [B, rows] of an iteration, out of ``kept`` patches."""
        if self._rank is None:
            raise RuntimeError(
                "begin() draws the order of patches: call it before the first iteration"
            )
        count = min(self.rows, kept)
        order = inputs.rows_of(self._rank)[:, :kept].argsort(dim=1)
        turn = torch.arange(count, device=order.device)
        turn = (turn + inputs.iteration_tensor * count) % kept
        return order[:, turn]


def gaussian_entropy(features: Tensor) -> Tensor:
    """Entropy of a Gaussian with the variance of the pairwise cosine similarities.

    ``s`` [B, n²] are the similarities of all pairs of features, including each feature with itself.
    Equal to::

        0.5 * (2 * math.pi * math.e * (s.var(1, correction=0) + 1e-8)).log().mean()

    Args:
        features: [B, n, D].

    Returns:
        the mean over images, a scalar.
    """
    unit = F.normalize(features, dim=-1, eps=1e-6)
    variance = (unit @ unit.mT).flatten(1).var(1, correction=0) + 1e-8
    return 0.5 * (math.log(2 * math.pi * math.e) + variance.log()).mean()
