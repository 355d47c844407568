"""Inversions: the loop from noise to images."""

from smi_fast.inversion.functional import invert
from smi_fast.inversion.inverter import SparseInverter
from smi_fast.inversion.result import FinishedGroup, InversionResult, NonFiniteLoss, Phase
from smi_fast.inversion.sparse_images import SparseImages
from smi_fast.inversion.state import InversionState

__all__ = [
    "FinishedGroup",
    "InversionResult",
    "InversionState",
    "NonFiniteLoss",
    "Phase",
    "SparseImages",
    "SparseInverter",
    "invert",
]
