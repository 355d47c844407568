"""The ops as Triton kernels, with the signatures of :mod:`smi_fast.ops.reference`.

This package is installed as ``smi_fast.kernels``. It imports triton, so ``smi_fast`` imports it
only when a kernel is first called.
"""

from .adam_clamp import adam_clamp_
from .batch_norm_matching import batch_norm_matching, batch_norm_matching_backward
from .gather_attention import gather_attention, gather_attention_backward
from .gather_patches import gather_patches, gather_patches_backward
from .gather_sigmoid_patches import gather_sigmoid_patches, gather_sigmoid_patches_backward
from .total_variation import total_variation, total_variation_backward

__all__ = [
    "adam_clamp_",
    "batch_norm_matching",
    "batch_norm_matching_backward",
    "gather_attention",
    "gather_attention_backward",
    "gather_patches",
    "gather_patches_backward",
    "gather_sigmoid_patches",
    "gather_sigmoid_patches_backward",
    "total_variation",
    "total_variation_backward",
]
