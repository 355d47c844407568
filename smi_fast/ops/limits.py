"""Sizes that a kernel can hold, in the same numbers as its source."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# csrc/cuda/gather_attention.cuh compiles these head widths, and allocates tokens by tiles.
CUDA_WIDTHS = (32, 64, 80, 128)
CUDA_TILE = 16


@dataclass(frozen=True)
class AttentionSize:
    """Size of one call of gather_attention.

    Attributes:
        tokens: K, the tokens of each image that attend.
        width: D, the width of a head.
        gradient: whether the call computes the input gradient, or will be asked for it.
    """

    tokens: int
    width: int
    gradient: bool


def most_tokens(width: int, itemsize: int, gradient: bool, shared_memory: int) -> int:
    """Largest K that fits into one block of the CUDA kernel of gather_attention.

    Args:
        width: D of a head, a multiple of 8 up to 128.
        itemsize: bytes of an element.
        gradient: whether the kernel is the backward one.
        shared_memory: bytes that one block can have.
    """
    row = next(w for w in CUDA_WIDTHS if w >= width) * itemsize + 16
    # Forward holds q, k and v of a token; backward also dO and two floats.
    token = 4 * row + 8 if gradient else 3 * row
    return shared_memory // (CUDA_TILE * token) * CUDA_TILE


def too_large_for_cuda(size: AttentionSize, dtype: torch.dtype, shared_memory: int) -> str | None:
    """Why the CUDA kernel of gather_attention can't hold a call, or None when it can."""
    if size.width % 8 or size.width > CUDA_WIDTHS[-1]:
        return f"the CUDA kernel takes heads as wide as a multiple of 8 up to 128, got {size.width}"
    most = most_tokens(size.width, dtype.itemsize, size.gradient, shared_memory)
    if size.tokens <= most:
        return None
    return (
        f"the CUDA kernel holds {most} tokens of width {size.width} in {dtype}"
        f"{' for the gradient' if size.gradient else ''} in {shared_memory} bytes of shared "
        f"memory, got {size.tokens}"
    )
