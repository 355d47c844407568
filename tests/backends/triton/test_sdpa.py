"""PyTorch's attention, which takes the sets that one Triton program can't hold."""

from __future__ import annotations

import pytest
import torch

from smi_fast import kernels
from smi_fast.ops import reference
from smi_fast.verify.cases import random_kept

F64 = torch.float64
sdpa = kernels._sdpa


@pytest.mark.parametrize("gathered", [False, True])
def test_rows_past_the_lengths_are_not_read(gathered: bool) -> None:
    torch.manual_seed(0)
    qkv, lengths = torch.randn(3, 9, 3, 2, 8, dtype=F64), torch.tensor([4, 0, 6])
    index = random_kept(3, 6, 9) if gathered else None
    count = 6 if gathered else 9
    grad = torch.randn(3, count, 16, dtype=F64)
    exact = reference.gather_attention(qkv, index, lengths, True)
    exact_gradient = reference.gather_attention_backward(grad, qkv, index, lengths)
    for image, length in enumerate(lengths.tolist()):
        beyond = range(length, 9) if index is None else index[image, length:].tolist()
        qkv[image, list(beyond)] = torch.nan
        grad[image, length:] = torch.nan
    for ours, expected in zip(sdpa.attention(qkv, index, lengths, True), exact, strict=True):
        torch.testing.assert_close(ours, expected)
    gradient = sdpa.attention_backward(grad, qkv, index, lengths)
    torch.testing.assert_close(gradient, exact_gradient)
