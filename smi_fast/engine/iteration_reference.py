"""The specification of what an iteration on a GPU has in front of the blocks and behind them, in
plain PyTorch: tokens of patches, the loss, the gradient of pixels, and the rows of tables.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.ops.reference import gather_patches_backward, sum_dtype, total_variation_backward


def embed_tokens(
    projected: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    at: Tensor | None,
    table: Tensor | None,
    positions: Tensor,
) -> Tensor:
    """The tokens [B, P + K, D] of projected patches [B, K, D] at positions int64 [B, K].

    The other arguments are those of an :class:`smi_fast.engine.embedding.Embedding`.
    """
    patches = projected if bias is None else projected + bias
    patches = patches if table is None else patches + table[positions]
    first = prefix if at is None else prefix + at
    return torch.cat([first.expand(len(patches), -1, -1), patches], dim=1)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy [B] of each row of logits [B, classes] with its class, targets int64 [B].

    Also the gradient [B, classes] that their mean has for the logits.
    """
    values = logits.to(sum_dtype(logits.dtype))
    wanted = F.one_hot(targets, logits.shape[1])
    gradient = (values.softmax(dim=1) - wanted) / max(1, len(logits))
    return F.cross_entropy(values, targets, reduction="none"), gradient.to(logits.dtype)


def pixel_gradient(
    grad: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    patch_size: int,
    sums: Tensor,
) -> Tensor:
    """The gradient [B, C, H, W] that images have by their gathered patches, and by their variation.

    The sum of gather_patches_backward and total_variation_backward, whose arguments these are, for
    one set of patches.
    """
    jitter, side = (shift, flip), images.shape[2:]
    windows = gather_patches_backward(grad, kept, *jitter, patch_size, *side)
    return windows + total_variation_backward(grad_l1, grad_l2, images, kept, patch_size, sums)


def rows_at(
    shift: Tensor, flip: Tensor, lr: Tensor, iteration: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of each table at an iteration int64 [1], with a first axis of 1.

    The tables are shift int64 [T, ...], flip bool [T, ...] and lr float64 [T].
    """
    at_shift, at_flip, at_lr = (table.index_select(0, iteration) for table in (shift, flip, lr))
    return at_shift, at_flip, at_lr
