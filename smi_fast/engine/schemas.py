"""Schemas, fakes and default kernels of the engine's steps as ``torch.ops.smi_fast.*``."""

from __future__ import annotations

import torch

from smi_fast.engine import reference
from smi_fast.ops.schemas import TRITON, triton_kernel

# The steps of a block, see smi_fast.engine.reference. They write into contiguous tensors.
_STEPS = {
    "add_normalize_": (
        "(Tensor(a!) x, Tensor? added, Tensor? bias, float eps, Tensor(b!) normalized,"
        " Tensor(c!) rstd, bool centred=True) -> ()"
    ),
    "normalize_backward_": (
        "(Tensor(a!) gradient, Tensor grad, Tensor normalized, Tensor rstd, Tensor(b!)? copy,"
        " bool centred=True) -> ()"
    ),
    "gelu_": '(Tensor(a!) x, Tensor bias, Tensor(b!) out, str approximate="none") -> ()',
    "multiply_": "(Tensor(a!) x, Tensor factors) -> ()",
    "swiglu_": "(Tensor(a!) x, Tensor bias, Tensor(b!) out) -> ()",
    "swiglu_backward_": "(Tensor grad, Tensor factors, Tensor(a!) d_x) -> ()",
    "rotate_": "(Tensor(a!) x, Tensor bias, Tensor rotation, bool half) -> ()",
    "rotate_backward_": ("(Tensor(a!) gradient, int parts, Tensor rotation, bool half) -> ()"),
    "attend_": "(Tensor qkv, Tensor q_bias, Tensor(a!) out, Tensor? offsets=None) -> ()",
    "attend_backward_": (
        "(Tensor grad, Tensor qkv, Tensor q_bias, Tensor(a!) d_qkv, Tensor? offsets=None) -> ()"
    ),
    "attend_rows": (
        "(Tensor q, Tensor q_bias, Tensor kv, Tensor? offsets=None) -> (Tensor, Tensor)"
    ),
    "attend_rows_backward": (
        "(Tensor grad, Tensor q, Tensor q_bias, Tensor kv, Tensor probabilities,"
        " Tensor? offsets=None) -> (Tensor, Tensor)"
    ),
}

# Steps that have Triton kernels, each an op of its own as those of smi_fast.ops.schemas. Images are
# never concatenated there. Those from linear_gelu_ on have no other kernels: they fuse more.
TRITON_STEPS = {
    **{
        name: _STEPS[name]
        for name in (
            "add_normalize_",
            "normalize_backward_",
            "gelu_",
            "multiply_",
            "swiglu_",
            "swiglu_backward_",
            "rotate_",
            "rotate_backward_",
        )
    },
    "attend_rows": "(Tensor q, Tensor q_bias, Tensor kv) -> (Tensor, Tensor)",
    "attend_rows_backward": (
        "(Tensor grad, Tensor q, Tensor q_bias, Tensor kv, Tensor probabilities)"
        " -> (Tensor, Tensor)"
    ),
    "linear_gelu_": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor(a!) derivative, Tensor(b!) out,"
        ' str approximate="none", int side=0) -> ()'
    ),
    "multiplied_product_": (
        "(Tensor grad, Tensor weight, Tensor factors, Tensor(a!) out, int side=0) -> ()"
    ),
    "cross_entropy": "(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    "embed_tokens": (
        "(Tensor projected, Tensor? bias, Tensor prefix, Tensor? at, Tensor? table,"
        " Tensor positions) -> Tensor"
    ),
    "pixel_gradient": (
        "(Tensor grad, Tensor kept, Tensor shift, Tensor flip, Tensor grad_l1, Tensor grad_l2,"
        " Tensor images, int patch_size, Tensor sums) -> Tensor"
    ),
    "rows_at": (
        "(Tensor shift, Tensor flip, Tensor lr, Tensor iteration) -> (Tensor, Tensor, Tensor)"
    ),
    "add_normalize_rows_": (
        "(Tensor x, Tensor added, Tensor bias, float eps, Tensor(a!) out, Tensor(b!) normalized,"
        " Tensor(c!) rstd, bool centred=True) -> ()"
    ),
    "normalize_backward_rows_": (
        "(Tensor of_rows, Tensor grad, Tensor normalized, Tensor rstd, Tensor(a!) gradient,"
        " Tensor(b!)? copy, bool centred=True) -> ()"
    ),
    "final_norm_": (
        "(Tensor x, Tensor added, Tensor bias, Tensor weight, Tensor? shift, float eps,"
        " Tensor(a!) normalized, Tensor(b!) rstd, Tensor(c!) out, bool centred=True) -> ()"
    ),
    "final_norm_backward_": (
        "(Tensor grad, Tensor normalized, Tensor rstd, Tensor weight, Tensor(a!) gradient,"
        " Tensor(b!)? copy, bool centred=True) -> ()"
    ),
}

# Whole blocks, or the first rows of the last block, without rotary positions and with them; whether
# products of a tensor's type are oneDNN's here; and the tokens in front of the first block. These
# have kernels in C++ only.
_BLOCKS = {
    "run_blocks_": (
        "(Tensor(a!) x, Tensor[] weights, Tensor[] packed, int packed_rows,"
        " Tensor(b!)[] normalized, float[] eps, Tensor(c!) attended, Tensor(d!) hidden, bool saves,"
        " Tensor? offsets, bool centred, str approximate) -> Tensor[]"
    ),
    "run_blocks_backward_": (
        "(Tensor(a!) gradient, Tensor[] weights, Tensor[] packed, int packed_rows,"
        " Tensor[] normalized, Tensor[] saved, Tensor(b!) d_qkv, Tensor? offsets, bool centred)"
        " -> ()"
    ),
    "run_rotary_blocks_": (
        "(Tensor(a!) x, Tensor[] weights, Tensor[] packed, int packed_rows,"
        " Tensor(b!)[] normalized, float[] eps, Tensor(c!) attended, Tensor(d!) hidden, bool saves,"
        " Tensor[] rotations, bool half, bool centred, str approximate) -> Tensor[]"
    ),
    "run_rotary_blocks_backward_": (
        "(Tensor(a!) gradient, Tensor[] weights, Tensor[] packed, int packed_rows,"
        " Tensor[] normalized, Tensor[] saved, Tensor(b!) d_qkv, Tensor[] rotations, bool half,"
        " bool centred) -> ()"
    ),
    "last_rotary_block_rows": (
        "(Tensor tokens, Tensor[] weights, float[] eps, int heads, int rows, Tensor rotation,"
        " bool half, bool centred, str approximate) -> Tensor[]"
    ),
    "last_rotary_block_rows_backward": (
        "(Tensor grad, Tensor[] weights, Tensor[] saved, Tensor rotation, bool half, bool centred)"
        " -> Tensor"
    ),
    "last_block_rows": (
        "(Tensor tokens, Tensor[] weights, float[] eps, int heads, int rows, Tensor? offsets,"
        " bool centred, str approximate) -> Tensor[]"
    ),
    "last_block_rows_backward": (
        "(Tensor grad, Tensor[] weights, Tensor[] saved, Tensor? offsets, bool centred) -> Tensor"
    ),
    "products_by_onednn": "(Tensor like) -> bool",
    "embed_patches": (
        "(Tensor patches, Tensor weight, Tensor? bias, Tensor prefix, Tensor? table,"
        " Tensor positions) -> Tensor"
    ),
    "embed_patches_backward": "(Tensor grad, Tensor weight, int prefix) -> Tensor",
}

_library = torch.library.Library("smi_fast", "FRAGMENT")
for _name, _schema in (_STEPS | _BLOCKS).items():
    _library.define(_name + _schema)
for _name in _STEPS:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
for _name, _schema in TRITON_STEPS.items():
    _library.define(_name + TRITON + _schema)
    _library.impl(_name + TRITON, triton_kernel(_name), "CUDA")


def _writes_into_its_arguments(*_: object) -> None:
    return None


for _name in _STEPS:
    if _name.endswith("_"):
        torch.library.register_fake(f"smi_fast::{_name}", _writes_into_its_arguments, lib=_library)
