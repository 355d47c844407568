"""batch_norm_matching against BatchNorm in eval mode and the published term."""

from __future__ import annotations

import pytest
import torch

from smi_fast import ops

pytestmark = pytest.mark.usefixtures("each_backend")


F64 = torch.float64


def test_batch_norm_matching_is_batch_norm_and_the_published_term() -> None:
    x = torch.randn(3, 5, 4, 6, dtype=F64, requires_grad=True)
    mean, bias = torch.randn(2, 5, dtype=F64)
    var, weight = torch.rand(2, 5, dtype=F64) + 0.5
    y, loss = ops.batch_norm_matching(x, mean, var, weight, bias, 1e-3)
    expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-3)
    torch.testing.assert_close(y, expected)
    own = x.detach().transpose(0, 1).flatten(1)
    term = torch.norm(own.var(1, correction=0) - var) + torch.norm(own.mean(1) - mean)
    torch.testing.assert_close(loss, term)
    assert torch.autograd.gradcheck(
        lambda x: ops.batch_norm_matching(x, mean, var, weight, bias, 1e-3), x
    )


def test_statistics_that_match_exactly_have_gradient_zero() -> None:
    x = torch.full((2, 3, 4, 2), 0.5, requires_grad=True)
    half, ones = torch.full((3,), 0.5), torch.ones(3)
    _, loss = ops.batch_norm_matching(x, half, torch.zeros(3), ones, half)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(x))


def test_bad_statistics_are_refused() -> None:
    of_four = [torch.ones(4)] * 4
    with pytest.raises(
        ValueError, match=r"running_mean torch.float32 \[3\], got torch.float32 \[4\]"
    ):
        ops.batch_norm_matching(torch.zeros(2, 3, 4, 4), *of_four)
    with pytest.raises(ValueError, match="not empty"):
        ops.batch_norm_matching(torch.zeros(0, 4, 4, 4), *of_four)


def test_statistics_of_float16_are_float32() -> None:
    """The variance exceeds the largest float16."""
    x = (600 * torch.randn(2, 3, 8, 8)).half().requires_grad_()
    zeros, ones = torch.zeros(2, 3).half(), torch.ones(2, 3).half()
    channel = (zeros[0], ones[0], ones[1], zeros[1])
    y, loss = ops.batch_norm_matching(x, *channel, backend="reference")
    exact = x.detach().double().var((0, 2, 3), correction=0) - 1
    mean = x.detach().double().mean((0, 2, 3))
    assert y.dtype == torch.float16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.norm() + mean.norm(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.dtype == torch.float16 and gradient.isfinite().all()
