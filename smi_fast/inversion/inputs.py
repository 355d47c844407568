"""Checks of what an inversion is given, and the defaults of what it isn't."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from smi_fast.engine.precision import FLOAT32
from smi_fast.parametrizations import Parametrization
from smi_fast.teacher import SparseViT
from smi_fast.teacher.space import ImageSpace

OPTIMIZERS = ("adam", "adamw")
ADAMW_DECAY = 0.01  # of torch.optim.AdamW


def as_sparse(teacher: nn.Module, backend: str, precision: str | None) -> SparseViT:
    """The teacher that computes only kept patches: as it is given, or wrapped.

    Raises:
        ValueError: no such precision, or another one than that of a given SparseViT.
    """
    if not isinstance(teacher, SparseViT):
        return SparseViT(teacher, backend=backend, precision=precision or FLOAT32)
    if precision not in (None, teacher.precision):
        raise ValueError(
            f"expected precision {teacher.precision!r}, that of the given SparseViT, "
            f"got {precision!r}"
        )
    return teacher


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


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value.

    Raises:
        ValueError: it isn't among those that are allowed.
    """
    if value not in allowed:
        raise ValueError(f"expected {name} {' or '.join(allowed)}, got {value!r}")
    return value


def weight_decay_of(optimizer: str, weight_decay: float | None) -> float:
    """The weight decay of an optimiser, 0 for "adam" and by default torch's for "adamw".

    Raises:
        ValueError: another optimiser, a weight decay of "adam", or one below 0 or not finite.
    """
    one_of("optimizer", optimizer, OPTIMIZERS)
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
        ValueError: images of another shape, type or device; a parametrization that can't start from
            images; or one whose parameters or images aren't what the loop needs.
    """
    if init is None:
        parameters = parametrization.initial(batch, generator)
    else:
        _check_init(parametrization, init, batch)
        parameters = parametrization.parameters_of(init.detach())
    _check_parameters(parametrization, parameters, batch)
    # The update is in place, on a flat view that other strides don't have.
    parameters = parameters.detach().clone(memory_format=torch.contiguous_format)
    _check_images(parametrization, parameters)
    return parameters


def _check_init(parametrization: Parametrization, init: Tensor, batch: int) -> None:
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


def _check_parameters(parametrization: Parametrization, parameters: Tensor, batch: int) -> None:
    space, name = parametrization.space, type(parametrization).__name__
    expected = f"parameters of {name} as floating point [{batch}, {space.channels}, ...]"
    if not isinstance(parameters, Tensor):
        raise ValueError(f"expected {expected}, got {type(parameters).__name__}")
    shape, device = parameters.shape, space.mean.device
    if (
        len(shape) < 3
        or shape[:2] != (batch, space.channels)
        or not parameters.is_floating_point()
        or parameters.device != device
    ):
        raise ValueError(
            f"expected {expected} on {device}, "
            f"got {parameters.dtype} {list(shape)} on {parameters.device}"
        )


def _check_images(parametrization: Parametrization, parameters: Tensor) -> None:
    """Compute the first images once, to see whether the loop can optimise them."""
    space, name = parametrization.space, type(parametrization).__name__
    like, shape = space.mean, (len(parameters), space.channels, space.height, space.width)
    images = parametrization.images(parameters.detach().requires_grad_())
    if not isinstance(images, Tensor):
        raise ValueError(f"expected images of {name} as a tensor, got {type(images).__name__}")
    if images.shape != shape or images.dtype != like.dtype or images.device != like.device:
        raise ValueError(
            f"expected images of {name} as {like.dtype} {list(shape)} on {like.device}, "
            f"got {images.dtype} {list(images.shape)} on {images.device}"
        )
    if not images.requires_grad:
        raise ValueError(f"expected images of {name} to be differentiable, without .detach()")


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
