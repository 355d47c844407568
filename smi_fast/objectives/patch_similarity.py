"""PSAQ-ViT's prior: patches of a real image are unlike each other in many degrees."""

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
# Added to the density under the logarithm.
FLOOR = 1e-4
# Cosine similarity's least norm.
EPS = 1e-8
# Distance, in bandwidths·√2, from which a kernel counts as exp(-81): far below the last digit of
# the floor, and not denormal, which processors are slow with.
FAR = 9.0
# Kernel values held at once: small enough for a core's cache, large enough for a GPU.
TILE = {"cpu": 1 << 18}
TILE_ELSEWHERE = 1 << 24


class PatchSimilarity(Objective):
    """Negative entropy of the patches' cosine similarities, summed over blocks.

    For each block the heads' outputs are averaged over heads and prefix tokens left out; see
    :func:`similarity_entropy` for the rest. Source: PSAQ-ViT (arXiv 2203.02250), equations 5 to 8,
    with the numbers of its code, which weights it 1.

    With kept patches the similarities are those among kept patches, K² of them.

    Args:
        blocks: from 0, or from the end when negative; None for all, as published.
        weight: factor.
    """

    name = "patch_similarity"

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
    """Differential entropy of the cosine similarities of all pairs of features, mean over images.

    With every pair's similarity ``s`` [B, N²], each with itself included, and ten points ``x`` from
    the least to the greatest of the batch, which get no gradient, equal to::

        kernel = torch.exp(-((x[:, None] - s[:, None]) ** 2) / (2 * 0.01**2))
        density = kernel.mean(-1) / (2 * math.pi * 0.01**2) ** 0.5 + 1e-4
        torch.trapezoid(-density * density.log(), x).mean()

    Value and gradient come in one pass over tiles of pairs i <= j; neither the kernel [B, 10, N²]
    nor its gradient is ever held.

    Args:
        features: [B, N, D].
    """
    entropy: Tensor = _SimilarityEntropy.apply(F.normalize(features, dim=-1, eps=EPS))
    return entropy


class _SimilarityEntropy(torch.autograd.Function):
    """Of unit features; the gradient is taken with the value, since both need the same kernel."""

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
    """Similarities [B, R, M] of R rows with the M columns from the first of them on.

    Columns after the R first stand for both (i, j) and (j, i).
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
        """The least and the greatest similarity of the batch."""
        ends = torch.stack([torch.stack(tile.aminmax()) for tile in self.similarities])
        return ends[:, 0].amin(), ends[:, 1].amax()

    def density(self, x: Tensor) -> Tensor:
        """[B, POINTS], of all pairs at the points."""
        batch, count, _ = self.unit.shape
        total = self.unit.new_zeros(batch, POINTS)
        for tile in self.similarities:
            kernel, _ = _kernel(tile, x)
            rows = tile.shape[1]
            total += 2 * kernel.sum((2, 3)) - kernel[..., :rows].sum((2, 3))
        return total / (count**2 * math.sqrt(2 * math.pi) * BANDWIDTH)

    def gradient(self, x: Tensor, slope: Tensor) -> Tensor:
        """[B, N, D], of the sum of slope [B, POINTS] times density."""
        unit, count = self.unit, self.unit.shape[1]
        # d kernel / ds = kernel (x - s) / h², and distances are in units of h √2.
        scale = math.sqrt(2) / BANDWIDTH / (count**2 * math.sqrt(2 * math.pi) * BANDWIDTH)
        slope = (2 * scale * slope)[:, None]
        result = torch.zeros_like(unit)
        for start, tile in zip(self.starts, self.similarities, strict=True):
            kernel, distance = _kernel(tile, x)
            of_pairs = (slope @ kernel.mul_(distance).flatten(2)).reshape(tile.shape)
            rows = tile.shape[1]
            result[:, start : start + rows] += of_pairs @ unit[:, start:]
            rest = of_pairs[..., rows:].mT @ unit[:, start : start + rows]
            result[:, start + rows :] += rest
        return result


def _kernel(tile: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian [B, POINTS, R, M] of each similarity around each point, and their distance."""
    unit = BANDWIDTH * math.sqrt(2)
    distance = (x / unit)[:, None, None] - (tile / unit)[:, None]
    distance.clamp_(-FAR, FAR)
    return torch.addcmul(distance.new_zeros(()), distance, distance, value=-1).exp_(), distance
