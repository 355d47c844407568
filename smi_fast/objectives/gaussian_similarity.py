"""MaskAQ's form of the patch-similarity entropy: closed, under a Gaussian, on sampled rows."""

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
    """Negative entropy that the patches' similarities would have if they were Gaussian.

    A patch is described by its attention scores towards the patches, averaged over heads; of these
    rows ``rows`` are sampled for each image. See :func:`gaussian_entropy` for the rest; the mean is
    taken over images and blocks. Source: MaskAQ (arXiv 2606.04373), with the numbers of its code,
    which weights it 1.

    The published code samples anew in every iteration. Here each image has a random order of its
    patches, drawn once, and successive iterations take the next ``rows`` of it. With fewer kept
    patches than ``rows`` all of them are taken.

    Args:
        blocks: from 0, or from the end when negative; None for all, as published.
        rows: sampled patches of each image.
        weight: factor.
    """

    name = "gaussian_similarity"

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
        rank = torch.rand(batch, teacher.num_patches, generator=generator)
        self._rank = rank.to(teacher.device)

    def __call__(self, inputs: LossInputs) -> Tensor:
        entropies = []
        picked: Tensor | None = None
        for name in self.taps(inputs.teacher.depth):
            scores = inputs.taps[name][
                :, :, inputs.teacher.num_prefix_tokens :, inputs.teacher.num_prefix_tokens :
            ].mean(1)
            if picked is None:
                rows = self._pick(scores.shape[1], inputs.iteration_tensor)
                picked = rows[..., None].expand(-1, -1, scores.shape[2])
            entropies.append(gaussian_entropy(scores.gather(1, picked)))
        return -torch.stack(entropies).mean()

    def _pick(self, kept: int, done: Tensor | None) -> Tensor:
        """int64 [B, rows], of each image the patches whose turn it is after ``done`` steps."""
        if self._rank is None:
            raise RuntimeError(
                "begin() draws the order of patches: call it before the first iteration"
            )
        count = min(self.rows, kept)
        order = self._rank[:, :kept].argsort(dim=1)
        turn = torch.arange(count, device=order.device)
        if done is not None:
            turn = (turn + done * count) % kept
        return order[:, turn]


def gaussian_entropy(features: Tensor) -> Tensor:
    """Entropy of a Gaussian with the variance of all pairs' cosine similarities, mean over images.

    With ``s`` [B, n²], each feature's similarity with itself included, equal to::

        0.5 * (2 * math.pi * math.e * (s.var(1, correction=0) + 1e-8)).log().mean()

    Args:
        features: [B, n, D].
    """
    unit = F.normalize(features, dim=-1, eps=1e-6)
    variance = (unit @ unit.mT).flatten(1).var(1, correction=0) + 1e-8
    return 0.5 * (math.log(2 * math.pi * math.e) + variance.log()).mean()
