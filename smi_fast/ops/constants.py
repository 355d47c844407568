"""Scalars on the device that are made once, so that an iteration neither fills nor copies them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def constant(value: float, like: Tensor) -> Tensor:
    """A scalar [] with the data type and device of a tensor. It is shared: never write into it."""
    if torch.compiler.is_compiling():
        return torch.full((), value, dtype=like.dtype, device=like.device)
    return _made(float(value), like.dtype, like.device)


def is_one(scalar: Tensor) -> bool:
    """Whether a scalar is :func:`constant` of 1, which the host sees without a wait."""
    one = constant(1.0, scalar)
    return scalar.data_ptr() == one.data_ptr() and scalar.shape == one.shape


@lru_cache(maxsize=256)
def _made(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else autograd could not save it
        return torch.full((), value, dtype=dtype, device=device)
