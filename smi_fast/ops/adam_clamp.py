"""One step of Adam on pixels and a clamp, in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smi_fast.ops._checks import as_value_error, expect, expect_device, expect_index, expect_patches
from smi_fast.ops.backends import AUTO, choose


@torch.no_grad()
def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    low: Tensor,
    high: Tensor,
    weight_decay: float = 0.0,
    active: Tensor | None = None,
    patch_size: int = 1,
    backend: str = AUTO,
) -> None:
    """One step of Adam on pixels and a clamp of each channel, in place.

    Equal to a step of ``torch.optim.AdamW`` (arXiv 1711.05101, eps 1e-8), which without weight
    decay is ``torch.optim.Adam``, followed by
    ``images.clamp_(low[:, None, None], high[:, None, None])``, on all pixels or on those of active
    patches.

    >>> pixels, *moments = torch.zeros(3, 1, 1, 2, 2)
    >>> bounds = {"low": torch.tensor([-0.2]), "high": torch.tensor([0.2])}
    >>> ops.adam_clamp_(pixels, pixels + 1, *moments, step=1, lr=0.25, betas=(0.5, 0.99), **bounds)
    >>> pixels.unique()
    tensor([-0.2000])

    Args:
        images: [B, C, H, W], changed.
        grad: [B, C, H, W].
        exp_avg: [B, C, H, W], running mean of the gradient, changed.
        exp_avg_sq: [B, C, H, W], running mean of the squared gradient, changed.
        step: number of this step, from 1. A tensor is int64 []; its value isn't checked, because
            that would wait for the device.
        lr: learning rate, from 0. A tensor is float64 []; its value isn't checked either.
        betas: decay rates of the two means, each in [0, 1).
        low: [C], smallest value of each channel.
        high: [C], largest value of each channel.
        weight_decay: from 0; pixels are multiplied by ``1 - lr * weight_decay`` before the update.
        active: int64 [B, K], distinct patches of the grid whose pixels change; None for all pixels.
        patch_size: side of a patch in pixels; read only with ``active``.
        backend: see :mod:`smi_fast.ops.backends`.

    Raises:
        ValueError: wrong shape, data type or device, or a number out of range;
            with the C++ kernels also a number of ``active`` out of range.
        BackendUnavailable: the backend can't run here.
    """
    expect(images.dim() == 4, "images [B, C, H, W]", images)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        fits = tensor.shape == images.shape and tensor.dtype == images.dtype
        expect(fits, f"{name} like images, {images.dtype} {list(images.shape)}", tensor)
        expect_device(tensor, images)
    for name, bound in (("low", low), ("high", high)):
        fits = bound.shape == (images.shape[1],) and bound.dtype == images.dtype
        expect(fits, f"{name} {images.dtype} [{images.shape[1]}]", bound)
        expect_device(bound, images)
    if not isinstance(step, Tensor):
        if step < 1:
            raise ValueError(f"expected step >= 1, got {step}")
        step = torch.tensor(step, device=images.device)
    expect(step.dim() == 0 and step.dtype == torch.int64, "step int64 []", step)
    expect_device(step, images)
    if not isinstance(lr, Tensor):
        _expect_rate("lr", lr)
        lr = torch.tensor(lr, dtype=torch.float64, device=images.device)
    expect(lr.dim() == 0 and lr.dtype == torch.float64, "lr float64 []", lr)
    expect_device(lr, images)
    _expect_rate("weight_decay", weight_decay)
    if active is not None:
        expect_patches(images, patch_size)
        expect_index("active", active, images)
    functions = choose("adam_clamp_", images.device, images.dtype, backend).functions
    moments = (exp_avg, exp_avg_sq)
    numbers = (step, lr, *betas, weight_decay, low, high)
    try:
        functions.adam_clamp_(images, grad, *moments, *numbers, active, patch_size)
    except RuntimeError as error:
        raise as_value_error(error) from None
    if not torch.compiler.is_compiling():
        # Autograd refuses a backward pass over tensors that were changed since: it must know.
        torch.autograd.graph.increment_version([images, *moments])


def _expect_rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"expected a finite {name} >= 0, got {value}")
