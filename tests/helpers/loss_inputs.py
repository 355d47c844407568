"""Objectives called alone, and compared with a plain formula."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from smi_fast.objectives import LossInputs
from smi_fast.teacher.space import ImageSpace

F64 = torch.float64


def loss_inputs(
    images: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    patch_size: int = 4,
    depth: int = 0,
    prefix: int = 0,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    **options: object,
) -> LossInputs:
    """What an objective reads, with a stand-in for the teacher; every patch is kept by default."""
    images = torch.zeros(2, 3, 8, 12, dtype=F64) if images is None else images
    batch, channels, height, width = images.shape
    patches = (height // patch_size) * (width // patch_size)
    channel = images.detach().new_ones(channels)
    given = {
        "targets": torch.zeros(batch),
        "kept": torch.arange(patches).expand(batch, -1),
        "active": None,
        "iteration_tensor": torch.tensor(options.get("iteration", 0)),
        **options,
    }
    return LossInputs(
        images=images,
        logits=images.new_zeros(batch, 5) if logits is None else logits,
        teacher=SimpleNamespace(patch_size=patch_size, depth=depth, num_prefix_tokens=prefix),
        space=ImageSpace(
            channels,
            height,
            width,
            0 * channel if mean is None else mean,
            channel if std is None else std,
        ),
        **given,
    )


def compare(ours: Callable, plain: Callable, given: Tensor, rtol: float = 1e-9) -> None:
    """Equal values, and equal gradients of autograd over the plain formula."""
    given = given.detach().requires_grad_()
    pair = ours(given), plain(given)
    torch.testing.assert_close(*pair, rtol=rtol, atol=1e-12)
    gradients = [torch.autograd.grad(value, given)[0] for value in pair]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)
    assert gradients[1].abs().max() > 1e-6
