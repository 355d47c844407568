"""Fast sparse model inversion of Vision Transformers, computed for kept patches only.

``invert`` and ``SparseInverter`` run a whole inversion, ``SparseViT`` goes into a loop of your own,
and ``smi_fast.ops`` has the single operations. A name is imported when it is first used, so that
importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Each public name by the module that has it; the types of the same names are in __init__.pyi.
_NAMES = {
    "calibrate": ("calibration",),
    "convert": ("from_huggingface", "from_open_clip", "from_torchvision"),
    "early_finish": ("EarlyFinish",),
    "inversion": ("InversionResult", "NonFiniteLoss", "SparseInverter", "invert"),
    "jitter": ("Jitter",),
    "learning_rate": ("Cosine", "LearningRate", "PerPhase"),
    "objectives": (
        "AdversarialJS",
        "AttentionPrior",
        "BatchNormMatching",
        "BinaryCrossEntropy",
        "CrossEntropy",
        "EmbeddingTarget",
        "GaussianSimilarity",
        "HeadSimilarity",
        "L2Norm",
        "LossInputs",
        "NeuronTarget",
        "Objective",
        "PatchSeamTV",
        "PatchSimilarity",
        "TokenStatistics",
        "TotalVariation",
        "UserTerm",
        "VariationTarget",
        "collect_statistics",
    ),
    "parametrizations": (
        "Fourier",
        "Parametrization",
        "Pixels",
        "Pyramid",
        "SigmoidParametrization",
    ),
    "schedules": (
        "Dense",
        "MassSchedule",
        "PatchRebirth",
        "ResolutionSchedule",
        "Schedule",
        "Selection",
        "Stop",
        "StopSchedule",
        "WrongSelection",
    ),
    "teacher": ("SparseOutput", "SparseStudent", "SparseViT", "UnsupportedTeacher"),
    "zoo": ("load_cnn", "load_teacher"),
}
_MODULES = {
    "augmentations": "augmentations",
    "compat": "compat",
    "importance": "importance",
    "ops": "ops",
    "recipes": "recipes",
    "taps": "teacher.taps",
    "targets": "objectives.targets",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES), *sorted(_MODULES)]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"smi_fast.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"smi_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'smi_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
