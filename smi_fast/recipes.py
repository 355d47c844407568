"""Published image losses as plain objects, which can be printed, changed and inverted with.

``smi_fast.SparseInverter(teacher, **recipe.options())`` uses a recipe, ``dataclasses.replace``
changes it. The published ones but SMI's are dense; with ``recipe.options(schedule=...)`` any of
them runs on kept patches only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.jitter import Jitter
from smi_fast.learning_rate import Cosine, LearningRate
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
from smi_fast.parametrizations import Fourier, Parametrization, Pixels
from smi_fast.schedules import Dense, Schedule, StopSchedule

# Largest shifts in pixels of 224, as published.
_DEEPINVERSION = Jitter(share=30 / 224)
_PSAQ_VIT = Jitter(share=(15 / 224, 30 / 224), starts=(0.5,))


def _dense(iterations: int) -> Schedule:
    return Dense()


def _published_stops(iterations: int) -> Schedule:
    return StopSchedule()


@dataclass(frozen=True)
class Recipe:
    """Objectives and settings of a published method.

    >>> recipe = recipes.by_name("psaq_vit")
    >>> recipe.iterations, recipe.lr
    (1000, Cosine(lr=0.2, warm_up=0.2, final=0.0, restarts=1))
    >>> inverter = SparseInverter(teacher, **recipe.options())

    Attributes:
        name: of the method.
        source: where the numbers come from.
        objectives: with their published weights.
        iterations: iterations of the optimiser.
        lr: learning rate, a number or a :class:`smi_fast.LearningRate`.
        betas: decay rates of Adam.
        jitter: how far images are shifted, and whether they are mirrored.
        schedule: when patches stop, as a function of the iterations.
        parametrization: what the optimiser moves.
        optimizer: "adam" or "adamw".
        soft: whether the targets are :func:`smi_fast.objectives.targets.soft_targets`.
        differs: how the recipe differs from the published method, and what is uncertain.
    """

    name: str
    source: str
    objectives: tuple[Objective, ...]
    iterations: int
    lr: float | LearningRate
    betas: tuple[float, float]
    soft: bool = False
    jitter: Jitter = field(default_factory=Jitter)
    schedule: Callable[[int], Schedule] = _dense
    parametrization: Parametrization = field(default_factory=Pixels)
    optimizer: str = "adam"
    differs: str = ""

    def options(self, **changes: Any) -> dict[str, Any]:
        """The recipe as keyword arguments of :class:`smi_fast.SparseInverter`.

        >>> options = recipes.clear().options(iterations=200)
        >>> options["iterations"], options["lr"]
        (200, 0.12)

        Args:
            **changes: further arguments, or other values than the recipe's. The stop of
                :func:`clear` moves with other iterations; those of :func:`smi` stay where they are
                published.

        Raises:
            ValueError: too few iterations for the stop of :func:`clear`, or no whole number.
        """
        names = (
            "objectives",
            "parametrization",
            "iterations",
            "lr",
            "betas",
            "jitter",
            "optimizer",
        )
        options = {**{name: getattr(self, name) for name in names}, **changes}
        if "schedule" not in options:
            options["schedule"] = self.schedule(options["iterations"])
        return options

    def targets(
        self, labels: Tensor, classes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Targets of an inversion.

        Args:
            labels: int64 [B], or int64 [B, n] for n classes in each image.
            classes: number of the teacher's classes.
            generator: draws soft targets, on the CPU; None for torch's own.

        Returns:
            the labels, or soft targets float32 [B, classes].

        Raises:
            ValueError: for soft targets, labels of another shape or type, or out of range.
        """
        return soft_targets(labels, classes, generator=generator) if self.soft else labels

    def __str__(self) -> str:
        name = {"adam": "Adam", "adamw": "AdamW"}[self.optimizer]
        adam = f"{name}, lr {self.lr}, betas {self.betas}, {self.iterations} iterations"
        objectives = [f"  {objective!r}" for objective in self.objectives]
        lines = [
            f"{self.name}: {self.source}",
            *objectives,
            f"  {self.parametrization!r}",
            f"  {adam}",
            f"  {self.jitter!r}",
        ]
        lines += ["  soft targets"] if self.soft else []
        return "\n".join([*lines, f"  differs: {self.differs}"] if self.differs else lines)


def smi() -> Recipe:
    """The recipe of Sparse Model Inversion (SMI)."""
    return Recipe(
        "smi",
        "SMI, arXiv 2510.27186, published code",
        (CrossEntropy(), TotalVariation(per_image=False)),
        4000,
        0.25,
        (0.5, 0.99),
        schedule=_published_stops,
    )


def clear() -> Recipe:
    """Images that independent networks recognise, in 100 iterations; not a published method.

    It is what :class:`smi_fast.SparseInverter` does by default.
    """
    return Recipe(
        "clear",
        "this project, by measurement: python -m benchmarks quality",
        (CrossEntropy(),),
        iterations=100,
        lr=0.12,
        betas=(0.5, 0.99),
        jitter=Jitter(per_image=True),
        schedule=StopSchedule.once,
        parametrization=Fourier(),
    )


def deepinversion(cnn: nn.Module, student: nn.Module | None = None) -> Recipe:
    """The recipe of DeepInversion, or with a student of Adaptive DeepInversion.

    Args:
        cnn: network with BatchNorm.
        student: network in eval mode, whose predictions are to differ from the teacher's.
    """
    objectives = [CrossEntropy(), TotalVariation(1e-4, per_image=False), L2Norm(1e-5)]
    objectives += [BatchNormMatching(cnn, 10.0, weight=0.05)]
    objectives += [] if student is None else [AdversarialJS(student, 0.2)]
    return Recipe(
        "deepinversion",
        "DeepInversion, arXiv 1912.08795, defaults of the published code",
        tuple(objectives),
        2000,
        Cosine(0.2, warm_up=0.05),
        (0.5, 0.9),
        jitter=_DEEPINVERSION,
        differs="BatchNorm statistics of a CNN beside the teacher instead of the teacher's; no "
        "start at half size; total variation and L2 of the un-jittered image",
    )


def psaq_vit() -> Recipe:
    """The recipe of PSAQ-ViT."""
    return Recipe(
        "psaq_vit",
        "PSAQ-ViT, arXiv 2203.02250, published code",
        (PatchSimilarity(), CrossEntropy(), VariationTarget()),
        1000,
        Cosine(0.2, warm_up=0.2, restarts=1),
        (0.5, 0.9),
        jitter=_PSAQ_VIT,
        differs="a shift of its own along each axis; total variation of the un-jittered image",
    )


def gradvit(cnn: nn.Module) -> Recipe:
    """GradViT's image objectives, with cross-entropy in place of gradient matching.

    Args:
        cnn: network with BatchNorm.
    """
    return Recipe(
        "gradvit",
        "GradViT, arXiv 2203.11894, for the objectives; weights, optimiser and jitter could not be "
        "looked up and are those of DeepInversion",
        (
            CrossEntropy(),
            BatchNormMatching(cnn, 10.0, weight=0.05),
            TotalVariation(1e-4, per_image=False),
            L2Norm(1e-5),
            PatchSeamTV(),
        ),
        2000,
        Cosine(0.2, warm_up=0.05),
        (0.5, 0.9),
        jitter=_DEEPINVERSION,
        differs="no gradient matching; constant weights instead of scheduled ones",
    )


def sardfq(attention_weight: float = 1.0) -> Recipe:
    """The recipe of SARDFQ.

    Args:
        attention_weight: of :class:`AttentionPrior`; the paper searches it for each model, from 1
            to 1e5.
    """
    return Recipe(
        "sardfq",
        "SARDFQ, arXiv 2412.16553; lr, betas and jitter could not be looked up and are those of "
        "PSAQ-ViT",
        (AttentionPrior(attention_weight), CrossEntropy(), TotalVariation(0.05, per_image=False)),
        1000,
        Cosine(0.2, warm_up=0.2, restarts=1),
        (0.5, 0.9),
        soft=True,
        jitter=_PSAQ_VIT,
        differs="no crops with labels of their own",
    )


def mimiq() -> Recipe:
    """The recipe of MimiQ."""
    return Recipe(
        "mimiq",
        "MimiQ, arXiv 2407.20021, published code",
        (HeadSimilarity(), CrossEntropy(), TotalVariation(2.5e-5, per_image=False)),
        2000,
        Cosine(0.1, final=0.001),
        (0.9, 0.999),
        optimizer="adamw",
        jitter=Jitter(share=(8 / 224, 16 / 224), starts=(0.5,)),
        differs="no noise and no colour jitter, whose amounts could not be looked up; betas and "
        "weight decay could not be looked up and are torch's defaults; that the larger of the "
        "published shifts, 8 and 16 px, begin after half of the iterations is assumed",
    )


_BY_NAME: dict[str, Callable[..., Recipe]] = {
    "clear": clear,
    "smi": smi,
    "deepinversion": deepinversion,
    "psaq_vit": psaq_vit,
    "gradvit": gradvit,
    "sardfq": sardfq,
    "mimiq": mimiq,
}
NAMES = tuple(_BY_NAME)
WITH_CNN = ("deepinversion", "gradvit")


def by_name(name: str, cnn: nn.Module | None = None) -> Recipe:
    """The recipe of a name, with its published weights.

    >>> by_name("smi").options()["lr"], by_name("gradvit", load_cnn("fashion-canvas")).name
    (0.25, 'gradvit')

    Args:
        name: "clear", "smi", "deepinversion", "psaq_vit", "gradvit", "sardfq" or "mimiq".
        cnn: network with BatchNorm, for the recipes of :data:`WITH_CNN` and no others.

    Raises:
        ValueError: another name, a missing CNN, or a CNN that the recipe doesn't take.
    """
    if name not in _BY_NAME:
        raise ValueError(f"expected a recipe among {', '.join(_BY_NAME)}, got {name!r}")
    if (cnn is not None) != (name in WITH_CNN):
        needs, got = ("a CNN", "none") if name in WITH_CNN else ("no CNN", "one")
        raise ValueError(f"the recipe {name} takes {needs} as prior (--cnn), got {got}")
    return _BY_NAME[name]() if cnn is None else _BY_NAME[name](cnn)
