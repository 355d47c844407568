"""The contract of an objective, a term of the loss, and what it may read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi_fast.jitter import jitter_images
from smi_fast.ops.backends import AUTO

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT
    from smi_fast.teacher.space import ImageSpace


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What the objectives of one iteration may read.

    Attributes:
        images: [B, C, H, W], normalised, not jittered.
        logits: [B, classes], of the jittered images.
        targets: int64 [B] or probabilities [B, classes].
        kept: int64 [B, K], the patches that the teacher computed, ascending.
        active: int64 [B, K], the patches whose pixels change, or None when all pixels change.
        teacher: the network that is inverted.
        space: the space that images are normalised in.
        backend: which implementation of the ops to use.
        iteration: from 0, known to the host.
        iteration_tensor: int64 [], the same on the images' device.
        jitter: shift int64 [2] and flip bool [] of this iteration, or None.
        taps: what the objectives asked for, by name, see :mod:`smi_fast.teacher.taps`.
    """

    images: Tensor
    logits: Tensor
    targets: Tensor
    kept: Tensor
    active: Tensor | None
    teacher: SparseViT
    space: ImageSpace
    backend: str = AUTO
    iteration: int = 0
    iteration_tensor: Tensor
    jitter: tuple[Tensor, Tensor] | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def jittered(self) -> Tensor:
        """[B, C, H, W], the images rolled and mirrored, background included; made when read."""
        return self.images if self.jitter is None else jitter_images(self.images, *self.jitter)


class Objective(ABC):
    """A term of the loss: ``weight * objective(inputs)`` is added to it.

    >>> class Brightness(Objective):
    ...     name, weight = "brightness", 0.1
    ...     def __call__(self, inputs):
    ...         return inputs.images.mean()

    Attributes:
        name: of its un-weighted value in the history.
        weight: its factor.
        every: iterations from one evaluation to the next; in between the value is a constant.
    """

    name: str
    weight: float
    every: int = 1

    def taps(self, depth: int) -> tuple[str, ...]:
        """The taps it reads from a teacher with ``depth`` blocks, see
        :mod:`smi_fast.teacher.taps`.
        """
        return ()

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        """Called before the first iteration of a batch, to draw whatever is random."""
        return None

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> Tensor:
        """The un-weighted scalar, on the images' device, without a read by the host."""


@dataclass(frozen=True)
class UserTerm(Objective):
    """A function ``(images, logits) -> scalar`` as an objective.

    The images are normalised and not jittered; the logits are of the jittered images.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    weight: float = 1.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        value = self.function(inputs.images, inputs.logits)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"expected the objective {self.name} to return a scalar tensor, got {got}"
            )
        return value.reshape(())


def as_objectives(
    terms: Iterable[Objective | Callable[[Tensor, Tensor], Tensor]],
) -> tuple[Objective, ...]:
    """Objectives with distinct names; functions are wrapped in :class:`UserTerm`.

    Raises:
        ValueError: no objective at all, or two with one name.
        TypeError: something that is neither an objective nor a function.
    """
    objectives = tuple(map(_as_objective, terms))
    names = [objective.name for objective in objectives]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"expected one or more objectives with different names, got {names}; "
            "UserTerm(function, name) names a function"
        )
    return objectives


def _as_objective(term: Objective | Callable[[Tensor, Tensor], Tensor]) -> Objective:
    if isinstance(term, Objective):
        return term
    if callable(term):
        return UserTerm(term, getattr(term, "__name__", type(term).__name__))
    raise TypeError(f"expected an objective or a function (images, logits) -> scalar, got {term!r}")
