"""PatchSimilarity against PSAQ-ViT's formula, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import smi_fast
from smi_fast.objectives.patch_similarity import TILE, similarity_entropy
from tests.helpers.loss_inputs import F64, compare, loss_inputs


def published_entropy(features: Tensor) -> Tensor:
    """PSAQ-ViT's differential entropy, kernel by kernel."""
    batch, count, _ = features.shape
    entropies = []
    similarities = torch.stack(
        [
            torch.cosine_similarity(features[b, i], features[b, j], dim=0)
            for b in range(batch) for i in range(count) for j in range(count)
        ]
    ).reshape(batch, -1)  # fmt: skip
    points = torch.linspace(similarities.min().item(), similarities.max().item(), 10, dtype=F64)
    for of_image in similarities:
        kernels = torch.exp(-((points[:, None] - of_image) ** 2) / (2 * 0.01**2))
        density = kernels.mean(1) / math.sqrt(2 * math.pi * 0.01**2) + 1e-4
        entropies.append(torch.trapz(-density * density.log(), points))
    return torch.stack(entropies).mean()


@pytest.mark.parametrize("count", [2, 3, 13])
@pytest.mark.parametrize("tile", [1, 600, 1 << 18])
def test_patch_similarity(count: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE, "cpu", tile)
    features = torch.randn(2, count, 6, dtype=F64) + 0.5
    compare(similarity_entropy, published_entropy, features)
    nearly_alike = torch.randn(1, 1, 6, dtype=F64) + 0.05 * features
    compare(similarity_entropy, published_entropy, nearly_alike)


def test_patch_similarity_gradient() -> None:
    # The first image has the least and the greatest similarity, so that the points stay.
    ends = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], dtype=F64)
    free = torch.tensor([[1.0, 0.3], [0.9, 0.4], [1.0, 0.45], [1.1, 0.2]], dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: similarity_entropy(torch.stack([ends, x])), free.requires_grad_(), eps=1e-7
    )


def test_patch_similarity_in_single_precision() -> None:
    features = torch.randn(2, 40, 16) + 0.5
    values, gradients = [], []
    for dtype in (torch.float32, F64):
        given = features.to(dtype).requires_grad_()
        values.append(similarity_entropy(given))
        gradients.append(torch.autograd.grad(values[-1], given)[0])
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-4, atol=1e-5)
    error = (gradients[0].double() - gradients[1]).norm() / gradients[1].norm()
    assert error < 2e-3


def test_patch_similarity_reads_mean_outputs_of_patches() -> None:
    outputs = {f"attention.{i}.output": torch.randn(2, 7, 3, 4, dtype=F64) for i in range(4)}
    expected = -sum(published_entropy(x[:, 2:].mean(2)) for x in outputs.values())
    objective = smi_fast.PatchSimilarity()
    assert objective.taps(4) == tuple(outputs)
    torch.testing.assert_close(objective(loss_inputs(taps=outputs, depth=4, prefix=2)), expected)
    last = smi_fast.PatchSimilarity(blocks=(-1,))
    expected = -published_entropy(outputs["attention.3.output"][:, 2:].mean(2))
    torch.testing.assert_close(last(loss_inputs(taps=outputs, depth=4, prefix=2)), expected)
