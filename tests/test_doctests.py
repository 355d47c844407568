"""The examples in docstrings run, and the public names have some."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import smi_fast

# Kernels import triton, and the compiled modules have no docstrings.
NOT_IMPORTED = ("smi_fast.kernels", "smi_fast._C_")
OBJECTIVES = (
    "AdversarialJS",
    "AttentionPrior",
    "BatchNormMatching",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "EmbeddingTarget",
    "GaussianSimilarity",
    "HeadSimilarity",
    "L2Norm",
    "NeuronTarget",
    "Objective",
    "PatchSeamTV",
    "PatchSimilarity",
    "TokenStatistics",
    "TotalVariation",
    "UserTerm",
    "VariationTarget",
)
WITH_EXAMPLES = [
    *(f"smi_fast.ops.{name}" for name in smi_fast.ops.__all__),
    *(f"smi_fast.objectives.{name}" for name in (*OBJECTIVES, "collect_statistics")),
    "smi_fast.objectives.targets.multi_targets",
    "smi_fast.objectives.targets.soft_targets",
    "smi_fast.inversion.SparseInverter",
    "smi_fast.inversion.invert",
    *(
        f"smi_fast.{module}.{name}"
        for module, names in {
            "augmentations": ("ColourShift", "GaussianNoise", "LowPass"),
            "jitter": ("Jitter",),
            "learning_rate": ("Cosine", "LearningRate", "PerPhase"),
            "parametrizations": (
                "Fourier",
                "Parametrization",
                "Pixels",
                "Pyramid",
                "SigmoidParametrization",
            ),
        }.items()
        for name in names
    ),
    "smi_fast.pool.Pool",
    "smi_fast.pool.RemotePool",
    "smi_fast.recipes.Recipe",
    "smi_fast.recipes.by_name",
    "smi_fast.schedules.Dense",
    "smi_fast.schedules.MassSchedule",
    "smi_fast.schedules.PatchRebirth",
    "smi_fast.schedules.ResolutionSchedule",
    "smi_fast.schedules.Schedule",
    "smi_fast.schedules.StopSchedule",
    "smi_fast.teacher.SigmoidImages",
    "smi_fast.teacher.SparseStudent",
    "smi_fast.teacher.SparseViT",
    "smi_fast.zoo.load_cnn",
    "smi_fast.zoo.load_teacher",
]


def modules(package: ModuleType) -> Iterator[str]:
    """The names of a package and of all modules in it that can be imported anywhere."""
    yield package.__name__
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if info.ispkg and not info.name.startswith(NOT_IMPORTED):
            yield from modules(importlib.import_module(info.name))
        elif not info.name.startswith(NOT_IMPORTED):
            yield info.name


@pytest.fixture
def namespace(tmp_path: Path) -> dict[str, Any]:
    """What examples may use: the public names, a teacher of 64 px, and an empty folder."""
    return {
        **{name: getattr(smi_fast, name) for name in smi_fast.__all__},
        "folder": tmp_path,
        "smi_fast": smi_fast,
        "teacher": smi_fast.load_teacher("fashion-canvas"),
        "torch": torch,
    }


@pytest.mark.parametrize("name", list(modules(smi_fast)))
def test_examples(name: str, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs=namespace)
    assert failed == 0, capsys.readouterr().out


def test_a_wrong_example_fails(namespace: dict[str, Any]) -> None:
    module = ModuleType("wrong", ">>> smi_fast.Dense().at\n(1,)\n")
    assert doctest.testmod(module, extraglobs=namespace).failed == 1


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_public_names_have_an_example(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    assert doctest.DocTestFinder(recurse=False).find(documented, attribute)[0].examples
