"""Checks of what an inversion is given, and the defaults of what it isn't."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smi_fast.jitter import random_jitter
from smi_fast.parametrizations import Parametrization
from smi_fast.schedules import Schedule, still_iterations
from smi_fast.teacher import SparseViT
from smi_fast.teacher.space import ImageSpace


def image_space(
    teacher: SparseViT, mean: Sequence[float] | None, std: Sequence[float] | None
) -> ImageSpace:
    """The space of a teacher's images; mean and std by default from its ``pretrained_cfg``.

    Raises:
        ValueError: no mean or std of each channel, or a std that isn't above 0.
    """
    pair = (_per_channel(teacher, name, given) for name, given in (("mean", mean), ("std", std)))
    return ImageSpace(teacher.channels, *teacher.image_size, *pair)


def _per_channel(teacher: SparseViT, name: str, given: Sequence[float] | None) -> Tensor:
    if given is None:
        given = (getattr(teacher.vit, "pretrained_cfg", None) or {}).get(name)
    if given is None:
        raise ValueError(f"the teacher's pretrained_cfg has no {name}: pass {name}=(r, g, b)")
    values = torch.tensor(tuple(given), dtype=torch.float64)
    if values.shape != (teacher.channels,):
        raise ValueError(f"expected {name} of {teacher.channels} channels, got {tuple(given)}")
    if name == "std" and (values <= 0).any():
        raise ValueError(f"expected std above 0, got {tuple(given)}")
    return values.to(teacher.device, teacher.dtype)


def check_targets(targets: Tensor | Sequence[int], teacher: SparseViT) -> Tensor:
    """Targets as int64 [B] or probabilities [B, classes] on the teacher's device.

    Raises:
        ValueError: another shape, type, range or device.
    """
    given, classes = torch.as_tensor(targets), teacher.num_classes
    if isinstance(targets, Tensor) and targets.device != teacher.device:
        raise ValueError(
            f"expected targets on {teacher.device}, as the teacher, got {targets.device}"
        )
    if given.dim() == 1 and not given.is_floating_point() and given.dtype != torch.bool:
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < classes:
            raise ValueError(
                f"expected targets in 0..{classes - 1}, got {int(given.min())}..{int(given.max())}"
            )
        return given.to(teacher.device, torch.int64)
    if given.dim() == 2 and given.is_floating_point() and given.shape[1] == classes:
        return given.to(teacher.device, teacher.dtype)
    raise ValueError(
        f"expected targets as whole numbers [B] or probabilities [B, {classes}], "
        f"got {given.dtype} {list(given.shape)}"
    )


def first_parameters(
    parametrization: Parametrization,
    init: Tensor | None,
    batch: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The parameters of the first images, or new ones where no images are given.

    Raises:
        ValueError: images of another shape, type or device, or a parametrization that can't start
            from images.
    """
    if init is None:
        # The update is in place on a flat view, which other strides don't have.
        return parametrization.initial(batch, generator).contiguous()
    space = parametrization.space
    shape = (batch, space.channels, space.height, space.width)
    if init.shape != shape or not init.is_floating_point() or init.device != space.mean.device:
        raise ValueError(
            f"expected init as floating point {list(shape)} on {space.mean.device}, "
            f"got {init.dtype} {list(init.shape)} on {init.device}"
        )
    return parametrization.parameters_of(init.detach())


def jitter_table(
    jitter: tuple[Tensor, Tensor] | None,
    iterations: int,
    teacher: SparseViT,
    schedule: Schedule,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Shift int64 [T, 2] and flip bool [T] of each iteration; there is no jitter around stops.

    Raises:
        ValueError: a table of another shape or type.
    """
    if jitter is None:
        jitter = random_jitter(iterations, teacher.image_size, generator)
    shift, flip = jitter
    if shift.shape != (iterations, 2) or shift.dtype != torch.int64:
        raise ValueError(
            f"expected shift int64 [{iterations}, 2], got {shift.dtype} {list(shift.shape)}"
        )
    if flip.shape != (iterations,) or flip.dtype != torch.bool:
        raise ValueError(f"expected flip bool [{iterations}], got {flip.dtype} {list(flip.shape)}")
    still = sorted(still_iterations(schedule))
    shift, flip = shift.to(teacher.device, copy=True), flip.to(teacher.device, copy=True)
    shift[still], flip[still] = 0, False
    return shift, flip
