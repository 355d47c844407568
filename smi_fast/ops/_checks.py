"""Checks of the arguments of ops. They say what was expected and what came."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# How the C++ kernels refuse an index, see checked_indices in csrc/cpu/common.h.
_OUT_OF_RANGE = re.compile(r"expected \w+ in \[0, \d+\), got -?\d+ at \[\d+, \d+\]")


def expect(holds: bool, expected: str, got: Tensor) -> None:
    """Raise a ValueError unless ``holds``, with the data type and shape of ``got``."""
    if not holds:
        raise ValueError(f"expected {expected}, got {got.dtype} {list(got.shape)}")


def expect_device(tensor: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless two tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"expected all tensors on {like.device}, got one on {tensor.device}")


def expect_patches(images: Tensor, patch_size: int) -> None:
    """Raise a ValueError unless whole patches cover the images [..., H, W]."""
    height, width = images.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"expected image sides that are multiples of the patch size {patch_size}, "
            f"got {height} x {width}"
        )


def expect_index(name: str, index: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless ``index`` is int64 [B, K] on the device of ``like`` [B, ...].

    Its values are not checked: that would wait for the device.
    """
    if not isinstance(index, Tensor):
        raise ValueError(f"expected {name} int64 [{len(like)}, K], got {type(index).__name__}")
    fits = index.dim() == 2 and len(index) == len(like) and index.dtype == torch.int64
    expect(fits, f"{name} int64 [{len(like)}, K]", index)
    expect_device(index, like)


def jitter_of_each(
    images: Tensor, shift: Tensor | tuple[int, int], flip: Tensor | bool
) -> tuple[Tensor, Tensor]:
    """The jitter of each image, shift int64 [B, 2] and flip bool [B], on the images' device.

    Raises:
        ValueError: wrong shape or data type.
    """
    batch = len(images)
    shift = torch.as_tensor(shift, device=images.device)
    flip = torch.as_tensor(flip, device=images.device)
    fits = shift.shape in ((2,), (batch, 2)) and shift.dtype == torch.int64
    expect(fits, f"shift int64 [2] or [{batch}, 2]", shift)
    fits = flip.shape in ((), (batch,)) and flip.dtype == torch.bool
    expect(fits, f"flip bool [] or [{batch}]", flip)
    return shift.expand(batch, 2), flip.expand(batch)


def as_value_error(error: RuntimeError) -> Exception:
    """What to raise for an error of a kernel: a ValueError when it refused an index."""
    found = _OUT_OF_RANGE.search(str(error))
    return error if found is None else ValueError(found[0])
