"""The fastest way to invert a Vision Transformer: sparse model inversion on kept patches.

``invert`` and ``SparseInverter`` run a whole inversion, ``SparseViT`` goes into a loop of your own,
and ``smi_fast.ops`` has the single operations. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from smi_fast import recipes, targets
    from smi_fast.inverter import SparseInverter, invert
    from smi_fast.objectives import BinaryCrossEntropy, CrossEntropy, L2Norm, TotalVariation
    from smi_fast.priors.adversarial import AdversarialJS
    from smi_fast.priors.attention_prior import AttentionPrior
    from smi_fast.priors.batch_norm import BatchNormMatching
    from smi_fast.priors.gaussian_similarity import GaussianSimilarity
    from smi_fast.priors.head_similarity import HeadSimilarity
    from smi_fast.priors.patch_similarity import PatchSimilarity
    from smi_fast.priors.seams import PatchSeamTV
    from smi_fast.priors.token_statistics import TokenStatistics, collect_statistics
    from smi_fast.priors.variation_target import VariationTarget
    from smi_fast.result import InversionResult, NonFiniteLoss
    from smi_fast.schedules import Dense, StopSchedule
    from smi_fast.supported import UnsupportedTeacher
    from smi_fast.teacher import SparseOutput, SparseViT
    from smi_fast.zoo import load_cnn, load_teacher

_HOMES = {
    "AdversarialJS": "priors.adversarial",
    "AttentionPrior": "priors.attention_prior",
    "BatchNormMatching": "priors.batch_norm",
    "GaussianSimilarity": "priors.gaussian_similarity",
    "HeadSimilarity": "priors.head_similarity",
    "PatchSimilarity": "priors.patch_similarity",
    "PatchSeamTV": "priors.seams",
    "TokenStatistics": "priors.token_statistics",
    "collect_statistics": "priors.token_statistics",
    "VariationTarget": "priors.variation_target",
    "InversionResult": "result",
    "NonFiniteLoss": "result",
    "SparseInverter": "inverter",
    "invert": "inverter",
    "BinaryCrossEntropy": "objectives",
    "CrossEntropy": "objectives",
    "L2Norm": "objectives",
    "TotalVariation": "objectives",
    "Dense": "schedules",
    "StopSchedule": "schedules",
    "SparseOutput": "teacher",
    "SparseViT": "teacher",
    "UnsupportedTeacher": "supported",
    "load_cnn": "zoo",
    "load_teacher": "zoo",
}

_MODULES = ("recipes", "targets")

__all__ = [
    "AdversarialJS",
    "AttentionPrior",
    "BatchNormMatching",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dense",
    "GaussianSimilarity",
    "HeadSimilarity",
    "InversionResult",
    "L2Norm",
    "NonFiniteLoss",
    "PatchSeamTV",
    "PatchSimilarity",
    "SparseInverter",
    "SparseOutput",
    "SparseViT",
    "StopSchedule",
    "TokenStatistics",
    "TotalVariation",
    "UnsupportedTeacher",
    "VariationTarget",
    "__version__",
    "collect_statistics",
    "invert",
    "load_cnn",
    "load_teacher",
    "recipes",
    "targets",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"smi_fast.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"smi_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'smi_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
