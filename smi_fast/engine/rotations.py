"""Rotary positions, as engines take them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# The rotation of patches in each block, see smi_fast.teacher.rotary.rotations; None without any.
Rotations = Sequence[Tensor] | None


def rotation_like(rotation: Tensor, tokens: Tensor) -> Tensor:
    """The rotation of one block as kernels read it: contiguous, in the data type of tokens."""
    return rotation.to(tokens.dtype).contiguous()


def rotations_like(rotations: Rotations, tokens: Tensor) -> list[Tensor] | None:
    """:func:`rotation_like` of each block; None without rotary positions."""
    return None if rotations is None else [rotation_like(each, tokens) for each in rotations]
