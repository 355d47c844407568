"""GaussianSimilarity against its formula, written out in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import smi_fast
from smi_fast.objectives.gaussian_similarity import gaussian_entropy
from tests.helpers.loss_inputs import F64, compare, loss_inputs
from tests.helpers.teachers import make_teacher


def published_gaussian(features: Tensor) -> Tensor:
    entropies = []
    for vectors in features:
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        similarities = (unit @ unit.T).flatten()
        variance = ((similarities - similarities.mean()) ** 2).mean() + 1e-8
        entropies.append(0.5 * torch.log(2 * math.pi * math.e * variance))
    return torch.stack(entropies).mean()


def test_gaussian_similarity() -> None:
    features = torch.randn(3, 9, 5, dtype=F64)
    compare(gaussian_entropy, published_gaussian, features)
    assert torch.autograd.gradcheck(gaussian_entropy, features.requires_grad_())


def test_gaussian_similarity_goes_through_all_patches() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))
    objective = smi_fast.GaussianSimilarity(rows=4)
    objective.begin(teacher, 2, torch.Generator().manual_seed(0))
    for kept in (16, 12):
        given = [loss_inputs(iteration=i) for i in range(kept)]
        picks = torch.stack([objective._pick(kept, inputs) for inputs in given])
        for image in range(2):
            counts = picks[:, image].flatten().bincount(minlength=kept)
            assert (counts == 4).all()
            in_turn = picks[: kept // 4, image].flatten()
            assert len(in_turn.unique()) == kept, "no patch comes again before all others have"
        assert not torch.equal(picks[0, 0], picks[0, 1])
    assert objective._pick(3, loss_inputs(iteration=1)).sort().values.tolist() == [[0, 1, 2]] * 2
    scores = {f"attention.{i}.scores": torch.randn(2, 3, 5, 5, dtype=F64) for i in range(2)}
    rows = [x.mean(1)[:, 1:, 1:] for x in scores.values()]
    expected = -sum(map(published_gaussian, rows)) / 2
    torch.testing.assert_close(objective(loss_inputs(taps=scores, depth=2, prefix=1)), expected)
