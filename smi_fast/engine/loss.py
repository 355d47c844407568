"""The loss behind the blocks: on a GPU in one kernel, which has its gradient too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.engine import schemas  # noqa: F401  (registers torch.ops.smi_fast.*)
from smi_fast.engine.gpu_steps import BACKEND
from smi_fast.ops import backends
from smi_fast.ops.constants import is_one


def cross_entropy(logits: Tensor, targets: Tensor, backend: str = backends.AUTO) -> Tensor:
    """``F.cross_entropy(logits, targets)``.

    Args:
        logits: [B, classes].
        targets: class indices int64 [B], or probabilities [B, classes], which PyTorch computes.
        backend: as the ops take it; another than "auto" and "triton" leaves it to PyTorch.
    """
    if targets.dtype == torch.int64 and _has_kernel(logits, backend):
        loss: Tensor = _CrossEntropy.apply(logits, targets)
        return loss
    return F.cross_entropy(logits, targets)


def _has_kernel(logits: Tensor, backend: str) -> bool:
    if torch.compiler.is_compiling() or backends.resolve(backend) not in (backends.AUTO, BACKEND):
        return False
    kernels = backends.by_name(BACKEND)
    return kernels.why_not("cross_entropy", logits.device, logits.dtype) is None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, gradient = backends.by_name(BACKEND).functions.cross_entropy(logits, targets)
        ctx.save_for_backward(gradient)
        mean: Tensor = losses.mean()
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient if is_one(grad) else gradient * grad.to(gradient.dtype), None
