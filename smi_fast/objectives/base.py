"""The contract of an objective, one weighted term of the loss, and what it may read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from smi_fast.jitter import jitter_images
from smi_fast.ops.backends import AUTO

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT
    from smi_fast.teacher.space import ImageSpace


class _Images:
    """A field of a dataclass: images, or a function that makes them when they are first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: LossInputs | None, kind: type | None = None) -> Tensor:
        if owner is None:
            raise AttributeError(self._name)  # the field has no default
        images: Tensor | Callable[[], Tensor] = vars(owner)[self._name]
        if not isinstance(images, Tensor):
            # Who reads them first may want no gradient; who reads them next may want one.
            with torch.enable_grad():
                images = vars(owner)[self._name] = images()
        return images

    def __set__(self, owner: LossInputs, images: Tensor | Callable[[], Tensor]) -> None:
        vars(owner)[self._name] = images


T = TypeVar("T")


class _Known(Generic[T]):
    """A field of a dataclass that may be None, and can't be read then."""

    def __init__(self, missing: str, default: T | None = None) -> None:
        self._missing, self._default = missing, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: LossInputs | None, kind: type | None = None) -> T:
        if owner is None:
            if self._default is None:
                raise AttributeError(self._name)  # the field has no default
            return self._default
        value: T | None = vars(owner)[self._name]
        if value is None:
            raise RuntimeError(f"an objective {self._missing}")
        return value

    def __set__(self, owner: LossInputs, value: T | None) -> None:
        vars(owner)[self._name] = value


_NO_LOGITS = (
    "with reads_logits=False read the logits, which are not computed where no objective reads "
    "them: leave reads_logits out"
)
_NO_ITERATION = (
    "read the iteration, which images don't have in common with finish: leave finish out"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What the objectives of one iteration may read.

    Attributes:
        images: [B, C, H, W], normalised, neither augmented nor jittered. They may be computed at
            the first read only: read them where they are needed.
        view: [B, C, H, W], the augmented images, which the teacher sees under jitter; None where
            they are the images.
        logits: [B, classes], of the jittered images' kept patches. They are computed only where an
            objective ``reads_logits``.
        targets: of the images, [B, ...], such as class indices int64 [B]; or None.
        kept: int64 [B, K], the patches that the teacher computed, ascending.
        active: int64 [B, K], the patches whose pixels change, or None when all pixels change. With
            ``lengths`` the first patch of an image repeats.
        lengths: int64 [B], how many of ``kept`` and ``active`` count in each image, the first ones;
            None where all do.
        teacher: the network that is inverted.
        space: size and normalisation of the images.
        backend: which implementation of the ops to use.
        rows: which images of the whole batch these are.
        iteration: from 0, as a number of the host. It can't be read with ``finish``, which lets
            images be at different iterations.
        iteration_tensor: int64 [], the same number on the images' device.
        jitter: shift int64 [2] in pixels and flip bool [] of this iteration, or [B, 2] and [B]; or
            None.
        taps: the tensors that the objectives asked for, by name, see
            :mod:`smi_fast.teacher.taps`.
    """

    images: _Images = _Images()
    view: Tensor | None = None
    logits: _Known[Tensor] = _Known(_NO_LOGITS)
    targets: Tensor | None
    kept: Tensor
    active: Tensor | None
    teacher: SparseViT
    space: ImageSpace
    backend: str = AUTO
    lengths: Tensor | None = None
    rows: slice | Tensor = field(default_factory=lambda: slice(None))
    iteration: _Known[int] = _Known(_NO_ITERATION, 0)
    iteration_tensor: _Known[Tensor] = _Known(_NO_ITERATION)
    jitter: tuple[Tensor, Tensor] | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def jittered(self) -> Tensor:
        """[B, C, H, W], the whole augmented images under jitter, computed at the first read."""
        with torch.enable_grad():
            view = self.images if self.view is None else self.view
            return view if self.jitter is None else jitter_images(view, *self.jitter)

    def rows_of(self, drawn: Tensor) -> Tensor:
        """The rows of these images, of a tensor with a row for each image of the whole batch."""
        return drawn[self.rows]


class Objective(ABC):
    """One weighted term of the loss: the loop adds ``weight * objective(inputs)``.

    >>> class Brightness(Objective):
    ...     name, weight = "brightness", 0.1
    ...     def __call__(self, inputs):
    ...         return inputs.images.mean()

    Attributes:
        name: key of its values, before the weight, in the history.
        weight: its factor.
        every: the loop calls the objective in iterations that are a multiple of it. In between the
            value is 0, without a gradient.
        separable: whether the value is the mean over the images of the values of each image alone.
            Only then can a batch be split (``max_batch``); what :meth:`begin` draws for each image
            is then read by :meth:`LossInputs.rows_of`.
        reads_logits: whether it reads :attr:`LossInputs.logits`. In iterations in which no
            objective does, the teacher runs only the blocks up to the last tap.
        reads_iteration: whether it reads :attr:`LossInputs.iteration` or its tensor.
    """

    name: str
    weight: float
    every: int = 1
    separable: bool = False
    reads_logits: bool = True
    reads_iteration: bool = False

    def taps(self, depth: int) -> tuple[str, ...]:
        """Names of the taps that it reads from a teacher with ``depth`` blocks.

        See :mod:`smi_fast.teacher.taps`.
        """
        return ()

    def check_targets(self, targets: Tensor | None, teacher: SparseViT) -> None:
        """Check the targets, where the objective reads them.

        The loop calls it before :meth:`begin`.

        Args:
            targets: [B, ...] on the teacher's device, int64 or of its data type; or None.
            teacher: the network that is inverted.

        Raises:
            ValueError: the objective can't read these targets.
        """
        return None

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        """Prepare for a batch: check the teacher, and draw random numbers.

        The loop calls it before the first iteration. What an objective draws here belongs to one
        batch, so two inversions that go on at the same time need objectives of their own.

        Args:
            teacher: the network that is inverted.
            batch: B, the number of images.
            generator: draws random numbers, on the CPU; None for torch's own.
        """
        return None

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> Tensor:
        """The scalar before its weight, on the images' device.

        It must not read a tensor on the host, so that an iteration can be captured in a CUDA graph.
        """


@dataclass(frozen=True)
class UserTerm(Objective):
    """A function ``(images, logits) -> scalar`` as an objective.

    The images [B, C, H, W] are normalised and not jittered; the logits [B, classes] are those of
    the jittered images' kept patches.

    >>> brightness = UserTerm(lambda images, logits: images.mean(), "brightness", weight=0.1)
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=[CrossEntropy(), brightness], **options).history)
    ['cross_entropy', 'brightness']

    Args:
        function: returns a tensor with one element.
        name: key of its values in the history.
        weight: factor.

    Raises:
        ValueError: during an inversion, when the function returns anything else.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    weight: float = 1.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.function(inputs.images, inputs.logits)


def value_of(objective: Objective, inputs: LossInputs) -> Tensor:
    """The value of an objective, a scalar.

    Raises:
        ValueError: it returns anything else than a tensor with one element.
    """
    value = objective(inputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"expected the objective {objective.name} to return a scalar tensor, got {got}"
        )
    return value.reshape(())


def as_objectives(
    given: Iterable[Objective | Callable[[Tensor, Tensor], Tensor]],
) -> tuple[Objective, ...]:
    """The given objectives; each function is wrapped in :class:`UserTerm`.

    Raises:
        ValueError: an empty list, two objectives with the same name, or one whose ``every`` isn't a
            whole number from 1.
        TypeError: no list, something in it that is neither an objective nor a function, or an
            objective without name or weight.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"expected a list of objectives, [CrossEntropy()], got {given!r}")
    objectives = tuple(map(_as_objective, given))
    names = [objective.name for objective in objectives]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"expected one or more objectives with different names, got {names}; "
            "UserTerm(function, name) names a function"
        )
    return objectives


def _as_objective(given: Objective | Callable[[Tensor, Tensor], Tensor]) -> Objective:
    if isinstance(given, type):
        raise TypeError(f"expected an objective, got the class {given.__name__}: call it")
    if isinstance(given, Objective):
        return _complete(given)
    if callable(given):
        return UserTerm(given, getattr(given, "__name__", type(given).__name__))
    raise TypeError(
        f"expected an objective or a function (images, logits) -> scalar, got {given!r}"
    )


def _complete(objective: Objective) -> Objective:
    """The objective, when it has what the loop reads of it."""
    kind = type(objective).__name__
    if not isinstance(getattr(objective, "name", None), str):
        raise TypeError(f"expected the objective {kind} to have a name, as name = {kind.lower()!r}")
    if not isinstance(getattr(objective, "weight", None), (Real, Tensor)):
        raise TypeError(f"expected the objective {kind} to have a weight, as weight = 1.0")
    every = objective.every
    if not isinstance(every, Integral) or every < 1:
        raise ValueError(
            f"expected every of the objective {objective.name} to be a whole number from 1, "
            f"got {every!r}"
        )
    return objective
