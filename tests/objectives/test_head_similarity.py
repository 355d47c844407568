"""HeadSimilarity against MimiQ's formula, written out in float64."""

from __future__ import annotations

import torch
from torch import Tensor

import smi_fast
from smi_fast.objectives.head_similarity import head_dissimilarity
from tests.helpers.loss_inputs import F64, compare, loss_inputs


def published_head_similarity(scores: Tensor) -> Tensor:
    """MimiQ's 1 - SSIM² of every pair of heads, one by one."""
    batch, heads, queries, _ = scores.shape
    found = []
    for b in range(batch):
        for n in range(queries):
            maps = scores[b, :, n] - scores[b, :, n].min(1, keepdim=True).values
            maps = maps / (maps.max(1, keepdim=True).values + 1e-8)
            for i in range(heads):
                for j in range(heads):
                    x, y = maps[i], maps[j]
                    cov = (x * y).mean() - x.mean() * y.mean()
                    var = [(z * z).mean() - z.mean() ** 2 for z in (x, y)]
                    ssim = (2 * x.mean() * y.mean() + 0.01**2) * (2 * cov + 0.03**2)
                    ssim = ssim / (x.mean() ** 2 + y.mean() ** 2 + 0.01**2)
                    found.append(1 - (ssim / (sum(var) + 0.03**2)) ** 2)
    return torch.stack(found).mean()


def test_head_similarity() -> None:
    scores = torch.randn(2, 3, 4, 6, dtype=F64)
    compare(head_dissimilarity, published_head_similarity, scores)
    assert torch.autograd.gradcheck(head_dissimilarity, scores.requires_grad_())
    taps = {f"attention.{i}.scores": torch.randn(1, 2, 6, 6, dtype=F64) for i in (1, 2)}
    expected = sum(published_head_similarity(x[:, :, 2:, 2:]) for x in taps.values()) / 2
    objective = smi_fast.HeadSimilarity(blocks=(1, -1))
    torch.testing.assert_close(objective(loss_inputs(taps=taps, depth=3, prefix=2)), expected)
