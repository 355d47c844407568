"""Soft and multiple targets, and the objective that takes them."""

from __future__ import annotations

import pytest
import torch

import smi_fast
from smi_fast import targets
from tests.helpers.loss_inputs import F64, loss_inputs


def test_soft_and_multiple_targets() -> None:
    labels = torch.tensor([[1, 4], [0, 2]])
    generator = torch.Generator().manual_seed(0)
    soft = targets.soft_targets(labels, 5, generator=generator)
    logits = soft.log() - soft.log().median(1, keepdim=True).values
    wanted = logits.gather(1, labels)
    assert ((wanted + 1e-4 >= 5) & (wanted <= 10 + 1e-4)).all() and wanted.unique().numel() == 4
    assert (logits.scatter(1, labels, 0.0).abs() < 1e-5).all()
    one = targets.soft_targets(torch.tensor([3]), 5, low=6.0, high=6.0)
    torch.testing.assert_close(one, torch.tensor([[0, 0, 0, 6.0, 0]]).softmax(1))
    multi = targets.multi_targets(labels, 5)
    assert multi.tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]

    logits = torch.randn(2, 5, dtype=F64)
    given = loss_inputs(logits=logits, targets=multi.double())
    p = 1 / (1 + torch.exp(-logits))
    expected = -(multi * p.log() + (1 - multi) * (1 - p).log()).mean()
    torch.testing.assert_close(smi_fast.BinaryCrossEntropy()(given), expected)
    with pytest.raises(ValueError, match=r"labels in 0\.\.4"):
        targets.multi_targets(torch.tensor([[5]]), 5)
    with pytest.raises(ValueError, match=r"labels int64 \[B\]"):
        targets.soft_targets(torch.tensor([1.0]), 5)
