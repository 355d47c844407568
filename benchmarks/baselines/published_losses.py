"""Losses as the published codes compute them: BatchNorm matching and patch-similarity entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hook_batch_norms(norms: Iterable[nn.BatchNorm2d]) -> list[Tensor]:
    """Register DeepInversion's hooks (arXiv 1912.08795).

    Args:
        norms: layers in eval mode. The hook of each takes mean and variance of its input once more.

    Returns:
        the list that each forward pass of a layer appends its distance to.
    """
    distances: list[Tensor] = []

    def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.transpose(0, 1).flatten(1).var(1, unbiased=False)
        distances.append(torch.norm(norm.running_var - var) + torch.norm(norm.running_mean - mean))

    for norm in norms:
        norm.register_forward_hook(hook)
    return distances


def similarity_entropy(features: Tensor, similarities: Callable[[Tensor], Tensor]) -> Tensor:
    """PSAQ-ViT's entropy (arXiv 2203.02250) of the similarities of features [B, N, D]."""
    batch = len(features)
    flat = similarities(features).reshape(batch, -1)
    points = torch.linspace(flat.min().item(), flat.max().item(), 10, dtype=flat.dtype)
    points = points.repeat(batch, 1)
    difference = points.view(batch, 10, 1) - flat.view(batch, 1, -1)
    kernel = torch.exp(-torch.pow(difference, 2) / (2 * 0.01**2))
    density = (kernel / math.sqrt(2 * math.pi * 0.01**2)).mean(dim=-1) + 1e-4
    return torch.trapz(-density * torch.log(density), points, dim=-1).mean()


def cosines_by_broadcast(features: Tensor) -> Tensor:
    """Cosine similarities [B, N, N] as published, which hold [B, N, N, D]."""
    return torch.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=3)


def cosines_by_matmul(features: Tensor) -> Tensor:
    """The same from one matrix product, which the published code could have used."""
    unit = F.normalize(features, dim=-1, eps=1e-8)
    return unit @ unit.mT
