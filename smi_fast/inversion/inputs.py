"""Checks of what an inversion is given, and the defaults of what it isn't."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from smi_fast.augmentations import Augment, apply, name_of
from smi_fast.jitter import Jitter
from smi_fast.objectives import Objective
from smi_fast.parametrizations import Parametrization
from smi_fast.schedules import Schedule, still_iterations
from smi_fast.teacher import SparseViT
from smi_fast.teacher.space import ImageSpace

OPTIMIZERS = ("adam", "adamw")
ADAMW_DECAY = 0.01  # of torch.optim.AdamW


def check_weights(teacher: SparseViT) -> None:
    """Check that pixels can be optimised in the teacher's data type and on its device.

    Raises:
        ValueError: weights in float16 or without values.
    """
    if teacher.device.type == "meta":
        raise ValueError(
            "expected a teacher with weights, got one on the meta device: load its weights first"
        )
    if teacher.dtype == torch.float16:
        raise ValueError(
            "expected a teacher in float32, float64 or bfloat16, got float16, in which the moments "
            "of Adam underflow: pass teacher.float()"
        )


def check_numbers(iterations: int, betas: tuple[float, float]) -> None:
    """Check the numbers of the optimiser that don't depend on others.

    Raises:
        ValueError: one of them out of range, or no number.
    """
    if not isinstance(iterations, Integral) or iterations < 1:
        raise ValueError(f"expected 1 or more iterations, got {iterations!r}")
    pair = betas if isinstance(betas, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in pair):
        raise ValueError(f"expected two betas in [0, 1), got {betas!r}")


def weight_decay_of(optimizer: str, weight_decay: float | None) -> float:
    """The weight decay of an optimiser, 0 for "adam" and by default torch's for "adamw".

    Raises:
        ValueError: another optimiser, a weight decay of "adam", or one below 0 or not finite.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"expected optimizer {' or '.join(OPTIMIZERS)}, got {optimizer!r}")
    if weight_decay is None:
        return ADAMW_DECAY if optimizer == "adamw" else 0.0
    if not (isinstance(weight_decay, Real) and 0 <= weight_decay < math.inf):
        raise ValueError(f"expected a finite weight_decay from 0, got {weight_decay!r}")
    if optimizer == "adam":
        raise ValueError(
            f"expected optimizer='adamw' with a weight_decay, got 'adam' with {weight_decay!r}"
        )
    return float(weight_decay)


def image_space(
    teacher: SparseViT, mean: Sequence[float] | None, std: Sequence[float] | None
) -> ImageSpace:
    """The space of a teacher's images; mean and std by default from its ``pretrained_cfg``.

    Raises:
        ValueError: no finite mean and std of each channel, or a std that isn't above 0.
    """
    pair = (_per_channel(teacher, name, given) for name, given in (("mean", mean), ("std", std)))
    return ImageSpace(teacher.channels, *teacher.image_size, *pair)


def _per_channel(teacher: SparseViT, name: str, given: Sequence[float] | None) -> Tensor:
    if given is None:
        given = (getattr(teacher.vit, "pretrained_cfg", None) or {}).get(name)
    if given is None:
        raise ValueError(f"the teacher's pretrained_cfg has no {name}: pass {name}=(r, g, b)")
    try:
        values = torch.tensor(tuple(given), dtype=torch.float64)
    except (TypeError, ValueError):
        values = torch.tensor(torch.nan)
    if values.shape != (teacher.channels,):
        got = tuple(given) if isinstance(given, Sequence) else given
        raise ValueError(f"expected {name} of {teacher.channels} channels, got {got!r}")
    if not values.isfinite().all():
        raise ValueError(f"expected a finite {name}, got {tuple(given)}")
    if name == "std" and (values <= 0).any():
        raise ValueError(f"expected std above 0, got {tuple(given)}")
    return values.to(teacher.device, teacher.dtype)


def as_targets(
    targets: Tensor | Sequence[int] | None, batch: int | None, teacher: SparseViT
) -> tuple[Tensor | None, int]:
    """Targets on the teacher's device, or None, and the number of images.

    Whole numbers become int64, floating point numbers get the teacher's data type.

    Raises:
        ValueError: no tensor with a row for each image, another device, or neither targets nor the
            number of images.
    """
    if (targets is None) == (batch is None):
        got = "neither" if batch is None else "both"
        raise ValueError(f"expected targets or batch, the number of images, got {got}")
    if batch is not None:
        if not isinstance(batch, Integral) or batch < 0:
            raise ValueError(f"expected batch, the number of images, from 0, got {batch!r}")
        return None, int(batch)
    try:
        given = torch.as_tensor(targets).detach()
    except (TypeError, ValueError, RuntimeError):
        given = torch.zeros(())
    if given.dim() == 0:
        raise ValueError(f"expected targets as a tensor with a row for each image, got {targets!r}")
    if isinstance(targets, Tensor) and targets.device != teacher.device:
        raise ValueError(
            f"expected targets on {teacher.device}, as the teacher, got {targets.device}"
        )
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    dtype = torch.int64 if whole else teacher.dtype if given.is_floating_point() else given.dtype
    return given.to(teacher.device, dtype), len(given)


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
    if not isinstance(init, Tensor):
        raise ValueError(
            f"expected init as a tensor {list(shape)}, got {type(init).__name__}: "
            "torch.from_numpy makes one of an array"
        )
    if init.shape != shape or not init.is_floating_point() or init.device != space.mean.device:
        raise ValueError(
            f"expected init as floating point {list(shape)} on {space.mean.device}, "
            f"got {init.dtype} {list(init.shape)} on {init.device}"
        )
    return parametrization.parameters_of(init.detach())


def check_generator(generator: torch.Generator | None) -> None:
    """Refuse a seed in place of a generator, and a generator of another device than the CPU.

    Raises:
        ValueError: the generator is one of these.
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"expected generator as torch.Generator().manual_seed(seed) or None, got {generator!r}"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"expected a generator on the CPU, got one on {generator.device}")


def on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on the device, with a seed that one of the CPU draws."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def check_jitter(jitter: Jitter | None, iterations: int, stops: Sequence[int]) -> Jitter:
    """The jitter that tables are drawn from, by default ``Jitter()``.

    Raises:
        TypeError: it is no :class:`Jitter`.
        ValueError: not one share for each phase.
    """
    if jitter is None:
        return Jitter()
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
        ValueError: it returns other images than it may.
    """
    before = generator.get_state()
    leaf = images.detach().requires_grad_()
    progress = torch.zeros((), dtype=torch.float32, device=images.device)
    seen = apply(augment, leaf, progress, generator)
    generator.set_state(before)
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
    if bool((shift.cpu().abs() > torch.tensor(teacher.image_size)).any()):
        raise ValueError(
            f"expected shifts by at most the image, {list(teacher.image_size)} pixels, "
            f"got one of {int(shift.abs().max())}"
        )
    still = sorted(still_iterations(schedule))
    shift, flip = shift.to(teacher.device, copy=True), flip.to(teacher.device, copy=True)
    shift[still], flip[still] = 0, False
    return shift, flip
