"""The public ops: each checks its arguments, chooses a backend, and has first-order gradients.

The docstring of each op gives the PyTorch expression that it equals. :mod:`smi_fast.ops.reference`
is the specification, and one of the backends.
"""

from smi_fast.ops.adam_clamp import adam_clamp_
from smi_fast.ops.batch_norm_matching import batch_norm_matching
from smi_fast.ops.gather_attention import gather_attention
from smi_fast.ops.gather_patches import gather_patches
from smi_fast.ops.gather_sigmoid_patches import gather_sigmoid_patches
from smi_fast.ops.total_variation import total_variation

__all__ = [
    "adam_clamp_",
    "batch_norm_matching",
    "gather_attention",
    "gather_patches",
    "gather_sigmoid_patches",
    "total_variation",
]
