"""Schemas, fakes and default kernels of the ops as ``torch.ops.smi_fast.*``.

- The default kernel of each op is the reference. A compiled backend registers its kernels under the
  dispatch key of its device.
- Each Triton kernel is an op of its own, ``*_triton``, so that CUDA and Triton kernels of one op
  can exist side by side.
- Autograd stays in :mod:`smi_fast.ops`: a call of an ``autograd.Function`` costs a third of one
  through a registered formula.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from smi_fast.ops import grid, reference

_SCHEMAS = {
    "gather_patches": (
        "(Tensor images, Tensor kept, Tensor shift, Tensor flip, int patch_size)"
        " -> (Tensor, Tensor)"
    ),
    "gather_patches_backward": (
        "(Tensor grad, Tensor kept, Tensor shift, Tensor flip, int patch_size, int height,"
        " int width) -> Tensor"
    ),
    "gather_sigmoid_patches": (
        "(Tensor field, Tensor kept, Tensor shift, Tensor flip, Tensor mean, Tensor std,"
        " Tensor? background, Tensor? frozen, int patch_size) -> (Tensor, Tensor)"
    ),
    "gather_sigmoid_patches_backward": (
        "(Tensor grad, Tensor field, Tensor kept, Tensor shift, Tensor flip, Tensor std,"
        " Tensor? frozen, int patch_size) -> Tensor"
    ),
    "gather_attention": (
        "(Tensor qkv, Tensor? token_index, Tensor? lengths, bool importance) -> (Tensor, Tensor)"
    ),
    "gather_attention_backward": (
        "(Tensor grad, Tensor qkv, Tensor? token_index, Tensor? lengths) -> Tensor"
    ),
    "total_variation": "(Tensor images, Tensor? active, int patch_size) -> Tensor",
    "total_variation_backward": (
        "(Tensor grad_l1, Tensor grad_l2, Tensor images, Tensor? active, int patch_size,"
        " Tensor sums) -> Tensor"
    ),
    "batch_norm_matching": (
        "(Tensor x, Tensor running_mean, Tensor running_var, Tensor weight, Tensor bias, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_matching_backward": (
        "(Tensor grad, Tensor x, Tensor running_var, Tensor weight, float eps, Tensor offset,"
        " Tensor slope) -> Tensor"
    ),
    "adam_clamp_": (
        "(Tensor(a!) images, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step,"
        " Tensor lr, float beta1, float beta2, float weight_decay, Tensor low, Tensor high,"
        " Tensor? active, int patch_size) -> ()"
    ),
}

TRITON = "_triton"


def triton_kernel(name: str) -> Callable[..., Any]:
    """A function of ``smi_fast.kernels``. Its first call imports that package, and so triton."""

    def kernel(*arguments: Any) -> Any:
        return getattr(importlib.import_module("smi_fast.kernels"), name)(*arguments)

    return kernel


def sdpa(op: str) -> Callable[..., Any]:
    """gather_attention or its gradient by PyTorch's fused kernels, see smi_fast.kernels._sdpa."""

    def kernel(*arguments: Any) -> Any:
        kernels = importlib.import_module("smi_fast.kernels._sdpa")
        return getattr(kernels, op.removeprefix("gather_"))(*arguments)

    return kernel


@lru_cache(maxsize=64)
def changed_by(op: str) -> tuple[int, ...]:
    """The positions of the arguments that an op changes in place."""
    arguments = getattr(torch.ops.smi_fast, op).default._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write)


_library = torch.library.Library("smi_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _library.define(_name + TRITON + _schema)
    _library.impl(_name + TRITON, triton_kernel(_name), "CUDA")


def _fake(name: str) -> Callable[[Callable[..., Any]], None]:
    def register(function: Callable[..., Any]) -> None:
        for op in (name, name + TRITON):
            torch.library.register_fake(f"smi_fast::{op}", function, lib=_library)

    return register


@_fake("gather_patches")
def _(
    images: Tensor, kept: Tensor, shift: Tensor, flip: Tensor, patch_size: int
) -> tuple[Tensor, Tensor]:
    batch, count = kept.shape
    return images.new_empty(batch, count, images.shape[1] * patch_size**2), kept.new_empty(
        batch, count
    )


@_fake("gather_patches_backward")
def _(
    grad: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    patch_size: int,
    height: int,
    width: int,
) -> Tensor:
    return grad.new_empty(len(grad), grad.shape[2] // patch_size**2, height, width)


@_fake("gather_sigmoid_patches")
def _(
    field: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    mean: Tensor,
    std: Tensor,
    background: Tensor | None,
    frozen: Tensor | None,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    batch, count = kept.shape
    return field.new_empty(batch, count, field.shape[1] * patch_size**2), kept.new_empty(
        batch, count
    )


@_fake("gather_sigmoid_patches_backward")
def _(
    grad: Tensor,
    field: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    std: Tensor,
    frozen: Tensor | None,
    patch_size: int,
) -> Tensor:
    return field.new_empty(field.shape)


@_fake("gather_attention")
def _(
    qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    batch, count, _, heads, width = qkv.shape
    count = count if token_index is None else token_index.shape[1]
    return qkv.new_empty(batch, count, heads * width), qkv.new_empty(
        batch, count if importance else 0
    )


@_fake("gather_attention_backward")
def _(grad: Tensor, qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape)


@_fake("total_variation")
def _(images: Tensor, active: Tensor | None, patch_size: int) -> Tensor:
    dtype = reference.sum_dtype(images.dtype)
    return images.new_empty(3, len(grid.NEIGHBOURS), dtype=dtype)


@_fake("total_variation_backward")
def _(
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    active: Tensor | None,
    patch_size: int,
    sums: Tensor,
) -> Tensor:
    return images.new_empty(images.shape)


@_fake("batch_norm_matching")
def _(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.sum_dtype(x.dtype)
    mean, var = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), mean, var


@_fake("batch_norm_matching_backward")
def _(
    grad: Tensor,
    x: Tensor,
    running_var: Tensor,
    weight: Tensor,
    eps: float,
    offset: Tensor,
    slope: Tensor,
) -> Tensor:
    return x.new_empty(x.shape)


@_fake("adam_clamp_")
def _(*_: object) -> None:
    """Return nothing: the op writes only into its arguments."""
