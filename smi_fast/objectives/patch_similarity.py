"""PSAQ-ViT's objective: the similarities of patches are as diverse as in real images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

BANDWIDTH = 0.01
POINTS = 10
# FLOOR is added to the density under the logarithm.
FLOOR = 1e-4
# EPS is the smallest norm in the cosine similarity.
EPS = 1e-8
# Distances are clamped to FAR, in units of bandwidth · √2. There the kernel is exp(-81): too small
# to change FLOOR, but not a denormal number, which processors compute slowly.
FAR = 9.0
# Kernel values in memory at once: few enough for a core's cache, or enough to fill a GPU.
TILE = {"cpu": 1 << 18}
TILE_ELSEWHERE = 1 << 24


class PatchSimilarity(Objective):
    """Negative entropy of the patches' cosine similarities, summed over blocks.

    The features of a patch are the outputs of a block's heads, averaged over heads. The K² pairs of
    kept patches have the entropy :func:`similarity_entropy`. Source: PSAQ-ViT (arXiv 2203.02250),
    equations 5 to 8, with the numbers of its code.

    >>> PatchSimilarity(blocks=[0, -1]).taps(depth=12)
    ('attention.0.output', 'attention.11.output')

    Args:
        blocks: indices of blocks, from the end when negative; None for all, as published.
        weight: factor.
    """

    name = "patch_similarity"
    reads_logits = False

    def __init__(self, blocks: Sequence[int] | None = None, weight: float = 1.0) -> None:
        self.blocks, self.weight = blocks, weight

    def __repr__(self) -> str:
        return f"PatchSimilarity(blocks={self.blocks}, weight={self.weight})"

    def taps(self, depth: int) -> tuple[str, ...]:
        return of_blocks("attention.{}.output", self.blocks, depth)

    def __call__(self, inputs: LossInputs) -> Tensor:
        features = (
            inputs.taps[name][:, inputs.teacher.num_prefix_tokens :].mean(2)
            for name in self.taps(inputs.teacher.depth)
        )
        return -torch.stack([similarity_entropy(feature) for feature in features]).sum()


def similarity_entropy(features: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities of all pairs of features.

    ``s`` [B, N²] are the similarities of all pairs, including each feature with itself. ``x`` [10]
    are evenly spaced points from the batch's smallest to its largest similarity, without gradient.
    Equal to::

        kernel = torch.exp(-((x[:, None] - s[:, None]) ** 2) / (2 * 0.01**2))
        density = kernel.mean(-1) / (2 * math.pi * 0.01**2) ** 0.5 + 1e-4
        torch.trapezoid(-density * density.log(), x).mean()

    One pass over tiles of the pairs i <= j computes value and gradient, so the kernel [B, 10, N²]
    is never stored.

    Args:
        features: [B, N, D].

    Returns:
        the mean over images, a scalar.
    """
    entropy: Tensor = _SimilarityEntropy.apply(F.normalize(features, dim=-1, eps=EPS))
    return entropy


class _SimilarityEntropy(torch.autograd.Function):
    """The entropy for features of norm 1. Forward computes the gradient from the same kernel."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        tiles = _Tiles(unit)
        low, high = tiles.extremes()
        x = low + (high - low) * torch.linspace(0, 1, POINTS, dtype=unit.dtype, device=unit.device)
        density = tiles.density(x) + FLOOR
        spacing = (high - low) / (POINTS - 1)
        width = spacing.repeat(POINTS)
        width[0] = width[-1] = spacing / 2
        if ctx.needs_input_grad[0]:
            slope = -(density.log() + 1) * width / len(unit)
            ctx.save_for_backward(tiles.gradient(x, slope))
        entropy: Tensor = -(density * density.log() * width).sum(1).mean()
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gradient: Tensor = ctx.saved_tensors[0]
        return grad * gradient


class _Tiles:
    """The similarity matrix [B, N, N] on and above its diagonal, cut into tiles [B, R, M].

    A tile has R rows, and the M columns from its first row's diagonal element to the end. Its first
    R columns hold both (i, j) and (j, i). Each value in a later column stands for these two pairs.
    """

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit
        batch, count, _ = unit.shape
        size = TILE.get(unit.device.type, TILE_ELSEWHERE)
        self.rows = max(1, min(count, size // (POINTS * batch * count)))
        self.starts = range(0, count, self.rows)
        self.similarities = [
            unit[:, start : start + self.rows] @ unit[:, start:].mT for start in self.starts
        ]

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest similarity of the batch, two scalars."""
        ends = torch.stack([torch.stack(tile.aminmax()) for tile in self.similarities])
        return ends[:, 0].amin(), ends[:, 1].amax()

    def density(self, x: Tensor) -> Tensor:
        """The density [B, POINTS] of all pairs at the points x [POINTS]."""
        batch, count, _ = self.unit.shape
        total = self.unit.new_zeros(batch, POINTS)
        for tile in self.similarities:
            kernel, _ = _kernel(tile, x)
            rows = tile.shape[1]
            total += 2 * kernel.sum((2, 3)) - kernel[..., :rows].sum((2, 3))
        return total / (count**2 * math.sqrt(2 * math.pi) * BANDWIDTH)

    def gradient(self, x: Tensor, slope: Tensor) -> Tensor:
        """The features' gradient [B, N, D] of the sum of slope [B, POINTS] times density."""
        unit, count = self.unit, self.unit.shape[1]
        # d kernel / ds = kernel (x - s) / h², and distances are in units of h √2.
        scale = math.sqrt(2) / BANDWIDTH / (count**2 * math.sqrt(2 * math.pi) * BANDWIDTH)
        slope = (2 * scale * slope)[:, None]
        result = torch.zeros_like(unit)
        for start, tile in zip(self.starts, self.similarities, strict=True):
            kernel, distance = _kernel(tile, x)
            pairs = (slope @ kernel.mul_(distance).flatten(2)).reshape(tile.shape)
            rows = tile.shape[1]
            result[:, start : start + rows] += pairs @ unit[:, start:]
            rest = pairs[..., rows:].mT @ unit[:, start : start + rows]
            result[:, start + rows :] += rest
        return result


def _kernel(tile: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian kernel and scaled distance, each [B, POINTS, R, M], of points and similarities."""
    unit = BANDWIDTH * math.sqrt(2)
    distance = (x / unit)[:, None, None] - (tile / unit)[:, None]
    distance.clamp_(-FAR, FAR)
    return torch.addcmul(distance.new_zeros(()), distance, distance, value=-1).exp_(), distance
