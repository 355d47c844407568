"""BatchNorm in eval mode, fused with DeepInversion's statistic-matching loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.ops._checks import expect, expect_device
from smi_fast.ops.backends import AUTO, Backend, choose


def batch_norm_matching(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode, and DeepInversion's statistic-matching loss of its input.

    Equal to::

        y = F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        loss = torch.dist(var, running_var) + torch.dist(mean, running_mean)

    Source: DeepInversion (arXiv 1912.08795), equation 4. Only ``x`` gets a gradient.

    >>> x, ones, zeros = torch.randn(2, 3, 8, 8), torch.ones(3), torch.zeros(3)
    >>> y, loss = ops.batch_norm_matching(x, zeros, ones, ones, zeros)
    >>> y.shape, loss.shape
    (torch.Size([2, 3, 8, 8]), torch.Size([]))

    Args:
        x: [B, C, H, W], not empty.
        running_mean: [C], recorded mean.
        running_var: [C], recorded variance.
        weight: [C], scale of the layer.
        bias: [C], offset of the layer.
        eps: added to ``running_var`` under the root.
        backend: see :mod:`smi_fast.ops.backends`.

    Returns:
        y [B, C, H, W], and the loss, a scalar in float32, or in float64 for such ``x``.

    Raises:
        ValueError: wrong shape, data type or device.
        BackendUnavailable: the backend can't run here.
    """
    expect(x.dim() == 4 and x.numel() > 0, "x [B, C, H, W], not empty", x)
    named = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, tensor in named.items():
        fits = tensor.shape == (x.shape[1],) and tensor.dtype == x.dtype
        expect(fits, f"{name} {x.dtype} [{x.shape[1]}]", tensor)
        expect_device(tensor, x)
    chosen = choose("batch_norm_matching", x.device, x.dtype, backend)
    y, loss = _BatchNormMatching.apply(x, running_mean, running_var, weight, bias, eps, chosen)
    return y, loss


class _BatchNormMatching(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        y, mean, var = backend.functions.batch_norm_matching(
            x, running_mean, running_var, weight, bias, eps
        )
        ctx.save_for_backward(x, running_mean, running_var, weight, mean, var)
        ctx.eps, ctx.backend = eps, backend
        recorded = running_mean.to(mean.dtype), running_var.to(var.dtype)
        return y, torch.dist(var, recorded[1]) + torch.dist(mean, recorded[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, running_mean, running_var, weight, mean, var = ctx.saved_tensors
        # d mean / dx = 1/n and d var / dx = 2 (x - mean)/n, so the loss's gradient is linear in x.
        count = x.numel() // x.shape[1]
        to_mean = grad_loss * _direction(mean - running_mean) / count
        to_var = grad_loss * _direction(var - running_var) / count
        gradient = ctx.backend.functions.batch_norm_matching_backward(
            grad_y, x, running_var, weight, ctx.eps, to_mean - 2 * to_var * mean, 2 * to_var
        )
        return gradient, None, None, None, None, None, None


def _direction(difference: Tensor) -> Tensor:
    """Gradient of the norm of a vector [C]; zero for the zero vector."""
    norm = torch.linalg.vector_norm(difference)
    return torch.where(norm > 0, difference / norm, 0.0)
