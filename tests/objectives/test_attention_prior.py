"""AttentionPrior against SARDFQ's formula, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import smi_fast
from smi_fast.objectives.attention_prior import random_mixtures
from smi_fast.verify.cases import random_kept
from tests.helpers.loss_inputs import F64, compare, loss_inputs
from tests.helpers.teachers import make_teacher


@pytest.mark.parametrize("sparse", [False, True])
def test_attention_prior(sparse: bool) -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=48, depth=5))
    objective = smi_fast.AttentionPrior()
    objective.begin(teacher, 2, torch.Generator().manual_seed(0))
    assert objective.taps(5) == tuple(f"attention.{i}.row" for i in (1, 2, 3, 4))
    assert smi_fast.AttentionPrior().taps(1) == ("attention.0.row",)
    mixtures = objective._mixtures.double()
    kept = random_kept(2, 4, 9) if sparse else torch.arange(9).expand(2, -1)
    rows = torch.rand(4, 2, 3, kept.shape[1] + 1, dtype=F64, requires_grad=True)

    def plain(rows: Tensor) -> Tensor:
        total = 0.0
        for index, level in enumerate((2, 3, 4, 5)):
            for head in range(3):
                errors = []
                for image in range(2):
                    prior = mixtures[index, image, head, kept[image]]
                    prior = prior / prior.sum()
                    errors.append(((rows[index, image, head, 1:] - prior) ** 2).mean())
                total = total + level / 5 * torch.stack(errors).mean()
        return total

    def ours(rows: Tensor) -> Tensor:
        taps = dict(zip(objective.taps(5), rows, strict=True))
        return objective(loss_inputs(taps=taps, depth=5, prefix=1, kept=kept))

    objective._mixtures = mixtures
    compare(ours, plain, rows)
    assert torch.autograd.gradcheck(ours, rows)


def test_one_or_two_components_are_equally_likely() -> None:
    """The logarithm of a single component has the same curvature everywhere."""
    mixtures = random_mixtures((800,), (12, 10), 2, torch.Generator().manual_seed(0)).double()
    broad = mixtures[mixtures.amin(1) > 1e-9].unflatten(1, (12, 10))
    curvature = broad.log().diff(2, dim=2).flatten(1)
    single = curvature.std(1) < 0.05 * curvature.mean(1).abs()
    # A mixture of two reaches every patch more often, so fewer than half of ``broad`` are single.
    assert len(broad) > 200 and 0.25 < single.double().mean() < 0.5


def test_mixtures_are_sums_of_gaussians() -> None:
    """The logarithm of a single component is a parabola along both axes."""
    generator = torch.Generator().manual_seed(1)
    mixtures = random_mixtures((40, 3), (12, 10), 5, generator)
    torch.testing.assert_close(mixtures.sum(-1), torch.ones(40, 3))
    assert mixtures.min() > 0 and not torch.equal(mixtures[0, 0], mixtures[0, 1])
    single = random_mixtures((50,), (12, 10), 1, generator).double().unflatten(1, (12, 10))
    broad = single[single.flatten(1).amin(1) > 1e-9]
    assert len(broad) > 10
    for axis in (1, 2):
        curvature = broad.log().diff(2, dim=axis)
        mean = curvature.mean((1, 2), keepdim=True)
        assert (mean < 0).all()
        torch.testing.assert_close(curvature, mean.expand_as(curvature), rtol=0.05, atol=1e-3)
