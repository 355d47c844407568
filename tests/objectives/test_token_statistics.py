"""TokenStatistics against plain means and variances of tapped tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import smi_fast
from smi_fast.verify.cases import random_kept
from tests.helpers.loss_inputs import F64, compare, loss_inputs
from tests.helpers.teachers import make_teacher


def test_token_statistics_from_images() -> None:
    teacher = make_teacher("deit_tiny_distilled_patch16_224", img_size=64, depth=3).double()
    sparse, images = smi_fast.SparseViT(teacher), torch.randn(7, 3, 64, 64, dtype=F64)
    loader = [images[:3], (images[3:5], torch.zeros(2)), [images[5:]]]
    found = smi_fast.collect_statistics(teacher, loader, blocks=(0, -1))
    assert list(found) == ["block.0.tokens", "block.2.tokens"]
    tapped = sparse(images, taps=found).taps
    for name, (mean, var) in found.items():
        tokens = tapped[name][:, 2:].flatten(0, 1)
        torch.testing.assert_close(mean, tokens.mean(0))
        torch.testing.assert_close(var, tokens.var(0, correction=0))

    objective = smi_fast.TokenStatistics(found)
    whole = objective(loss_inputs(taps=tapped, prefix=2))
    assert whole.item() < 1e-12
    other = torch.randn(2, 3, 64, 64, dtype=F64, requires_grad=True)
    kept = random_kept(2, 5, 16)

    def plain(x: Tensor) -> Tensor:
        total = 0.0
        for name, tokens in sparse(x, kept, taps=found).taps.items():
            mean, var = found[name]
            channels = tokens[:, 2:].flatten(0, 1)
            total = total + torch.norm(channels.mean(0) - mean)
            total = total + torch.norm(channels.var(0, correction=0) - var)
        return total

    compare(
        lambda x: objective(loss_inputs(taps=sparse(x, kept, taps=found).taps, prefix=2)),
        plain,
        other,
    )
    with pytest.raises(ValueError, match="a loader with images, got none"):
        smi_fast.collect_statistics(teacher, [])
    with pytest.raises(ValueError, match=r"blocks in -3..2, got \(3,\)"):
        smi_fast.collect_statistics(teacher, loader, blocks=(3,))
    wide = smi_fast.SparseViT(make_teacher("deit_small_patch16_224", img_size=64, depth=3))
    with pytest.raises(ValueError, match=r"mean and variance \[384\] on cpu, got \[192\]"):
        objective.begin(wide, 1, None)
