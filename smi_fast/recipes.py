"""The published image losses as plain objects: to print, to change, to invert with.

``smi_fast.SparseInverter(teacher, **recipe.options())`` runs one; ``dataclasses.replace`` changes
it. A schedule isn't part of a recipe: any of them runs dense or on kept patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.objectives import (
    AdversarialJS,
    AttentionPrior,
    BatchNormMatching,
    CrossEntropy,
    HeadSimilarity,
    L2Norm,
    Objective,
    PatchSeamTV,
    PatchSimilarity,
    TotalVariation,
    VariationTarget,
)
from smi_fast.objectives.targets import soft_targets


@dataclass(frozen=True)
class Recipe:
    """Published terms and settings.

    Attributes:
        name: of the method.
        source: where the numbers are from.
        objectives: terms with their weights.
        iterations: steps of the optimiser.
        lr: learning rate of Adam.
        betas: decay rates of Adam.
        soft: whether the targets are :func:`smi_fast.objectives.targets.soft_targets`.
        differs: what of the published method isn't here, or isn't certain.
    """

    name: str
    source: str
    objectives: tuple[Objective, ...]
    iterations: int
    lr: float
    betas: tuple[float, float]
    soft: bool = False
    differs: str = ""

    def options(self) -> dict[str, Any]:
        """What it means for :class:`smi_fast.SparseInverter`."""
        names = ("objectives", "iterations", "lr", "betas")
        return {name: getattr(self, name) for name in names}

    def targets(
        self, labels: Tensor, classes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """The targets of an inversion for labels int64 [B], or [B, n] for several of an image."""
        return soft_targets(labels, classes, generator=generator) if self.soft else labels

    def __str__(self) -> str:
        adam = f"Adam, lr {self.lr}, betas {self.betas}, {self.iterations} iterations"
        terms = [f"  {term!r}" for term in self.objectives]
        lines = [f"{self.name}: {self.source}", *terms, f"  {adam}"]
        lines += ["  soft targets"] if self.soft else []
        return "\n".join([*lines, f"  differs: {self.differs}"] if self.differs else lines)


def smi() -> Recipe:
    """Sparse model inversion."""
    return Recipe(
        "smi",
        "SMI, arXiv 2510.27186, published code",
        (CrossEntropy(), TotalVariation()),
        4000,
        0.25,
        (0.5, 0.99),
    )


def deepinversion(cnn: nn.Module, student: nn.Module | None = None) -> Recipe:
    """DeepInversion; with a student Adaptive DeepInversion.

    Args:
        cnn: prior with BatchNorm.
        student: that the images are to be hard for, in eval mode.
    """
    terms = [CrossEntropy(), TotalVariation(1e-4), L2Norm(1e-5, per_image=True)]
    terms += [BatchNormMatching(cnn, 10.0, weight=0.05)]
    terms += [] if student is None else [AdversarialJS(student, 0.2)]
    return Recipe(
        "deepinversion",
        "DeepInversion, arXiv 1912.08795, defaults of the published code",
        tuple(terms),
        2000,
        0.2,
        (0.5, 0.9),
        differs="the CNN stands beside the teacher, there it is the teacher; no start at half "
        "size; lr without warm-up and cosine; total variation and L2 of the un-jittered image",
    )


def psaq_vit() -> Recipe:
    """PSAQ-ViT."""
    return Recipe(
        "psaq_vit",
        "PSAQ-ViT, arXiv 2203.02250, published code",
        (PatchSimilarity(), CrossEntropy(), VariationTarget()),
        1000,
        0.2,
        (0.5, 0.9),
        differs="constant lr instead of two runs of 500 with warm-up and cosine; total variation "
        "of the un-jittered image",
    )


def gradvit(cnn: nn.Module) -> Recipe:
    """The image priors of GradViT, with cross-entropy where it matches gradients.

    Args:
        cnn: prior with BatchNorm.
    """
    return Recipe(
        "gradvit",
        "GradViT, arXiv 2203.11894, for the terms; weights and optimiser could not be looked up "
        "and are those of DeepInversion",
        (
            CrossEntropy(),
            BatchNormMatching(cnn, 10.0, weight=0.05),
            TotalVariation(1e-4),
            L2Norm(1e-5, per_image=True),
            PatchSeamTV(),
        ),
        2000,
        0.2,
        (0.5, 0.9),
        differs="no gradients to match; weights constant instead of scheduled",
    )


def sardfq(attention_weight: float = 1.0) -> Recipe:
    """SARDFQ.

    Args:
        attention_weight: of the attention prior, searched there for each model from 1 to 1e5.
    """
    return Recipe(
        "sardfq",
        "SARDFQ, arXiv 2412.16553; lr and betas could not be looked up and are those of PSAQ-ViT",
        (AttentionPrior(attention_weight), CrossEntropy(), TotalVariation(0.05)),
        1000,
        0.2,
        (0.5, 0.9),
        soft=True,
        differs="no crops with labels of their own",
    )


def mimiq() -> Recipe:
    """MimiQ."""
    return Recipe(
        "mimiq",
        "MimiQ, arXiv 2407.20021, published code",
        (HeadSimilarity(), CrossEntropy(), TotalVariation(2.5e-5)),
        2000,
        0.1,
        (0.9, 0.999),
        differs="Adam with a constant lr instead of AdamW with a cosine to 0.001; no noise and no "
        "colour jitter",
    )


_BY_NAME: dict[str, Callable[..., Recipe]] = {
    "smi": smi,
    "deepinversion": deepinversion,
    "psaq_vit": psaq_vit,
    "gradvit": gradvit,
    "sardfq": sardfq,
    "mimiq": mimiq,
}
WITH_CNN = ("deepinversion", "gradvit")


def by_name(name: str, cnn: nn.Module | None = None) -> Recipe:
    """A recipe with its published weights.

    Args:
        name: "smi", "deepinversion", "psaq_vit", "gradvit", "sardfq" or "mimiq".
        cnn: for those of :data:`WITH_CNN`.

    Raises:
        ValueError: another name, or a CNN missing or too many.
    """
    if name not in _BY_NAME:
        raise ValueError(f"expected a recipe among {', '.join(_BY_NAME)}, got {name!r}")
    if (cnn is not None) != (name in WITH_CNN):
        needs, got = ("a CNN", "none") if name in WITH_CNN else ("no CNN", "one")
        raise ValueError(f"the recipe {name} takes {needs} as prior (--cnn), got {got}")
    return _BY_NAME[name]() if cnn is None else _BY_NAME[name](cnn)
