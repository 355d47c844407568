"""Teachers: images in, tokens and logits out, computed for kept patches only."""

from smi_fast.teacher.sigmoid_images import SigmoidImages
from smi_fast.teacher.sparse_vit import Jitter, SparseOutput, SparseViT
from smi_fast.teacher.student import SparseStudent
from smi_fast.teacher.support import UnsupportedTeacher

__all__ = [
    "Jitter",
    "SigmoidImages",
    "SparseOutput",
    "SparseStudent",
    "SparseViT",
    "UnsupportedTeacher",
]
