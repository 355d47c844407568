"""The loss behind the blocks: on a GPU in one kernel, which has its gradient too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.engine import schemas  # noqa: F401  (registers torch.ops.smi_fast.*)
from smi_fast.ops import backends
from smi_fast.ops.constants import is_one


def cross_entropy(logits: Tensor, targets: Tensor, backend: str = backends.AUTO) -> Tensor:
    """``F.cross_entropy(logits, targets)``.

    Args:
        logits: [B, classes].
        targets: class indices int64 [B], or probabilities [B, classes], which PyTorch computes.
        backend: as the ops take it; another than "auto" and "triton" leaves it to PyTorch.
    """
    kernels = backends.step_kernels("cross_entropy", logits.device, logits.dtype, backend)
    if targets.dtype == torch.int64 and kernels is not None:
        loss: Tensor = _CrossEntropy.apply(logits, targets, kernels)
        return loss
    return F.cross_entropy(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, kernels: Any) -> Tensor:
        losses, gradient = kernels.cross_entropy(logits, targets)
        ctx.save_for_backward(gradient)
        mean: Tensor = losses.mean()
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient if is_one(grad) else gradient * grad.to(gradient.dtype), None, None
