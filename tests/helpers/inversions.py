"""Short inversions of the tiny teacher, and what every iteration of them shows."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    InversionResult,
    L2Norm,
    Pixels,
    SparseInverter,
    StopSchedule,
    TotalVariation,
)
from smi_fast.inversion import InversionState

SPACE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
# The published recipe, in numbers of its own.
PUBLISHED = {
    "objectives": (CrossEntropy(), TotalVariation(1e-4, per_image=False)),
    "parametrization": Pixels(),
    "lr": 0.25,
    "betas": (0.5, 0.99),
}
STOPS = StopSchedule((3, 6), (0.5, 0.5))
TARGETS = [1, 4]
EVERY_PIXEL_OBJECTIVE = (
    CrossEntropy(),
    TotalVariation(),
    TotalVariation(1e-3, "l1"),
    L2Norm(per_image=False),
)


def make(teacher: VisionTransformer, **options: object) -> SparseInverter:
    options = {"schedule": STOPS, "iterations": 10, **PUBLISHED, **SPACE, **options}
    return SparseInverter(teacher, **options)


def start(inverter: SparseInverter) -> InversionState:
    return inverter.start(TARGETS, generator=torch.Generator().manual_seed(0))


def run(teacher: VisionTransformer, seed: int = 0, **options: object) -> InversionResult:
    generator = torch.Generator().manual_seed(seed)
    return make(teacher, **options).invert(TARGETS, generator=generator, progress=False)


def frames(inverter: SparseInverter, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The images and the kept patches after every iteration."""
    images, kept = [], []
    inverter.invert(
        TARGETS,
        progress=False,
        generator=torch.Generator().manual_seed(0),
        callback=lambda _, pixels, patches: (images.append(pixels.clone()), kept.append(patches)),
        **options,
    )
    return images, kept


def pixels_of(kept: Tensor) -> Tensor:
    """Which pixels of the tiny teacher's images belong to patches, bool [B, 3, 32, 48]."""
    mask = torch.zeros(len(kept), 24, dtype=torch.bool).scatter(1, kept, True)
    mask = mask.reshape(-1, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return mask.expand(-1, 3, -1, -1)


def denormalized(images: Tensor) -> Tensor:
    """Pixels of images in the space of these inversions."""
    mean, std = (torch.tensor(SPACE[k], dtype=images.dtype)[:, None, None] for k in SPACE)
    return images * std + mean
