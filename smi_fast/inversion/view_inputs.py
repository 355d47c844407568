"""Checks of what decides the views of a batch: jitter, augmentation, copies and parts."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from smi_fast.augmentations import Augment, apply, name_of
from smi_fast.jitter import Jitter
from smi_fast.objectives import Objective
from smi_fast.schedules import Schedule, still_iterations
from smi_fast.teacher import SparseViT


def on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on the device, with a seed that one of the CPU draws."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def check_jitter(jitter: Jitter | None, iterations: int, stops: Sequence[int]) -> Jitter:
    """The jitter that tables are drawn from, by default that of each image for itself.

    Raises:
        TypeError: it is no :class:`Jitter`.
        ValueError: not one share for each phase.
    """
    if jitter is None:
        return Jitter(per_image=True)
    if not isinstance(jitter, Jitter):
        raise TypeError(
            "expected a Jitter, whose Jitter(share=0, flip=False) is none, or None for the "
            f"default, got {jitter!r}"
        )
    jitter.phases(iterations, stops)
    return jitter


def check_views(
    augment: Augment | None,
    copies: int,
    max_batch: int | None,
    objectives: tuple[Objective, ...],
) -> None:
    """Check what each iteration sees of a batch.

    Raises:
        TypeError: augment is no function.
        ValueError: copies or max_batch below 1, or a split with objectives that couple images.
    """
    if augment is not None and (not callable(augment) or isinstance(augment, type)):
        raise TypeError(
            "expected augment as a function (images, progress, generator) -> images, "
            f"GaussianNoise(), got {augment!r}"
        )
    if not isinstance(copies, Integral) or copies < 1:
        raise ValueError(f"expected 1 or more copies, got {copies!r}")
    if max_batch is None:
        return
    if not isinstance(max_batch, Integral) or max_batch < 1:
        raise ValueError(f"expected max_batch of 1 or more images, got {max_batch!r}")
    coupled = [objective.name for objective in objectives if not objective.separable]
    if coupled:
        raise ValueError(
            f"expected objectives of each image alone with max_batch, got {', '.join(coupled)}, "
            "which may couple the images of a batch: leave max_batch out"
        )


def check_augmented(augment: Augment, images: Tensor, generator: torch.Generator) -> None:
    """Try an augmentation on the first images, without a trace in the generator.

    Raises:
        ValueError: it returns other images than it may, or changes those that it is given.
    """
    before = generator.get_state()
    # No leaf of autograd, which would refuse a change in place in words of its own.
    given = images.detach().requires_grad_() * 1
    progress = torch.zeros((), dtype=torch.float32, device=images.device)
    seen = apply(augment, given, progress, generator)
    generator.set_state(before)
    if given._version > 0:
        raise ValueError(
            f"expected augment {name_of(augment)} to return new images, it changed the given ones"
        )
    if not seen.isfinite().all():
        raise ValueError(
            f"expected augment {name_of(augment)} to return finite images, got NaN or infinity"
        )


def jitter_table(
    given: Jitter | tuple[Tensor, Tensor],
    iterations: int,
    batch: int,
    copies: int,
    teacher: SparseViT,
    schedule: Schedule,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Shift int64 [T, 2] and flip bool [T] of each iteration, or [T, B, 2] and [T, B].

    With more copies than one, R is the second axis. There is no jitter around stops.

    Raises:
        ValueError: a given table of another shape or type, or a shift by more than the image.
    """
    if isinstance(given, Jitter):
        given = given.draw(
            iterations,
            teacher.image_size,
            batch=batch,
            copies=copies,
            stops=schedule.at,
            generator=generator,
        )
    pair = given if isinstance(given, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(table, Tensor) for table in pair):
        raise ValueError(
            "expected jitter as two tensors (shift, flip), or a Jitter, whose "
            f"Jitter(share=0, flip=False) is none, got {given!r}"
        )
    shift, flip = given
    alike = [iterations] if copies == 1 else [iterations, copies]
    shapes = [[*alike, 2], [*alike, batch, 2]]
    if list(shift.shape) not in shapes or shift.dtype != torch.int64:
        raise ValueError(
            f"expected shift int64 {shapes[0]} or {shapes[1]}, "
            f"got {shift.dtype} {list(shift.shape)}"
        )
    if flip.shape != shift.shape[:-1] or flip.dtype != torch.bool:
        raise ValueError(
            f"expected flip bool {list(shift.shape[:-1])}, got {flip.dtype} {list(flip.shape)}"
        )
    side = torch.tensor(teacher.image_size)
    # Not of the absolute value, which the least int64 doesn't have.
    if bool(((shift.cpu() > side) | (shift.cpu() < -side)).any()):
        raise ValueError(
            f"expected shifts by at most the image, {list(teacher.image_size)} pixels, "
            f"got some from {int(shift.min())} to {int(shift.max())}"
        )
    still = sorted(still_iterations(schedule))
    shift, flip = shift.to(teacher.device, copy=True), flip.to(teacher.device, copy=True)
    shift[still], flip[still] = 0, False
    return shift, flip
