"""The fastest way to invert a Vision Transformer: sparse model inversion on kept patches.

``invert`` and ``SparseInverter`` run a whole inversion, ``SparseViT`` goes into a loop of your own,
and ``smi_fast.ops`` has the single operations. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from smi_fast.inverter import SparseInverter, invert
    from smi_fast.objectives import CrossEntropy, L2Norm, TotalVariation
    from smi_fast.priors.batch_norm import BatchNormMatching
    from smi_fast.result import InversionResult, NonFiniteLoss
    from smi_fast.schedules import Dense, StopSchedule
    from smi_fast.teacher import SparseOutput, SparseViT, UnsupportedTeacher
    from smi_fast.zoo import load_teacher

_HOMES = {
    "BatchNormMatching": "priors.batch_norm",
    "InversionResult": "result",
    "NonFiniteLoss": "result",
    "SparseInverter": "inverter",
    "invert": "inverter",
    "CrossEntropy": "objectives",
    "L2Norm": "objectives",
    "TotalVariation": "objectives",
    "Dense": "schedules",
    "StopSchedule": "schedules",
    "SparseOutput": "teacher",
    "SparseViT": "teacher",
    "UnsupportedTeacher": "teacher",
    "load_teacher": "zoo",
}

__all__ = [
    "BatchNormMatching",
    "CrossEntropy",
    "Dense",
    "InversionResult",
    "L2Norm",
    "NonFiniteLoss",
    "SparseInverter",
    "SparseOutput",
    "SparseViT",
    "StopSchedule",
    "TotalVariation",
    "UnsupportedTeacher",
    "__version__",
    "invert",
    "load_teacher",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"smi_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'smi_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
