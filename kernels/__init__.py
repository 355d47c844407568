"""The ops as Triton kernels, with the signatures of :mod:`smi_fast.ops.reference`, and steps of the
engine, with those of :mod:`smi_fast.engine.reference`.

This package is installed as ``smi_fast.kernels``. It imports triton, so ``smi_fast`` imports it
only when a kernel is first called.
"""

from .active_variation import pixel_gradient
from .adam_clamp import adam_clamp_
from .attend_rows import attend_rows, attend_rows_backward
from .batch_norm_matching import batch_norm_matching, batch_norm_matching_backward
from .cross_entropy import cross_entropy
from .embed_tokens import embed_tokens
from .engine_eva import rotate_, rotate_backward_, swiglu_, swiglu_backward_
from .engine_products import linear_gelu_, multiplied_product_
from .engine_steps import (
    add_normalize_,
    add_normalize_rows_,
    final_norm_,
    final_norm_backward_,
    gelu_,
    multiply_,
    normalize_backward_,
    normalize_backward_rows_,
)
from .gather_attention import gather_attention, gather_attention_backward
from .gather_patches import gather_patches, gather_patches_backward
from .gather_sigmoid_patches import gather_sigmoid_patches, gather_sigmoid_patches_backward
from .rows_at import rows_at
from .total_variation import total_variation, total_variation_backward

__all__ = [
    "adam_clamp_",
    "add_normalize_",
    "add_normalize_rows_",
    "attend_rows",
    "attend_rows_backward",
    "batch_norm_matching",
    "batch_norm_matching_backward",
    "cross_entropy",
    "embed_tokens",
    "final_norm_",
    "final_norm_backward_",
    "gather_attention",
    "gather_attention_backward",
    "gather_patches",
    "gather_patches_backward",
    "gather_sigmoid_patches",
    "gather_sigmoid_patches_backward",
    "gelu_",
    "linear_gelu_",
    "multiplied_product_",
    "multiply_",
    "normalize_backward_",
    "normalize_backward_rows_",
    "pixel_gradient",
    "rotate_",
    "rotate_backward_",
    "rows_at",
    "swiglu_",
    "swiglu_backward_",
    "total_variation",
    "total_variation_backward",
]
