"""The terms of the loss: small objects with a name and a weight, or functions of your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast import ops
from smi_fast.backends import AUTO
from smi_fast.jitter import jitter_images

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT


@dataclass(frozen=True)
class Step:
    """What the terms of one iteration may read.

    Attributes:
        images: [B, C, H, W], normalised, not jittered.
        logits: [B, classes], of the jittered images.
        targets: int64 [B] or probabilities [B, classes].
        kept: int64 [B, K] when pixels outside these patches are frozen, else None.
        patch_size: side of a patch in pixels.
        backend: which implementation of the ops to use.
        iteration: from 0, known to the host.
        done: int64 [], the same on the images' device.
        jitter: shift int64 [2] and flip bool [] of this iteration, or None.
        mean: [C], of the space that images are normalised in.
        std: [C], likewise.
        taps: what the terms asked for, by name, see :mod:`smi_fast.taps`.
        depth: blocks of the teacher.
        prefix: its class, distillation and register tokens.
        seen: int64 [B, K], the patches that the teacher computed; None for all in order.
    """

    images: Tensor
    logits: Tensor
    targets: Tensor
    kept: Tensor | None
    patch_size: int
    backend: str = AUTO
    iteration: int = 0
    done: Tensor | None = None
    jitter: tuple[Tensor, Tensor] | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    depth: int = 0
    prefix: int = 0
    seen: Tensor | None = None

    @cached_property
    def jittered(self) -> Tensor:
        """[B, C, H, W], the images rolled and mirrored, background included; made when read."""
        return self.images if self.jitter is None else jitter_images(self.images, *self.jitter)


class Objective(ABC):
    """A term of the loss: ``weight * objective(step)`` is added to it.

    Attributes:
        name: of its un-weighted value in the history.
        weight: its factor.
        every: iterations from one evaluation to the next; in between it is a constant.
    """

    name: str
    weight: float
    every: int = 1

    def taps(self, depth: int) -> tuple[str, ...]:
        """What it reads of a teacher with ``depth`` blocks, see :mod:`smi_fast.taps`."""
        return ()

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        """Called before the first step of a batch; whatever is random is drawn here."""
        return None

    @abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """The un-weighted scalar, on the images' device and without a read by the host."""


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Mean cross-entropy of the logits against class indices or probabilities."""

    weight: float = 1.0
    name: str = "cross_entropy"

    def __call__(self, step: Step) -> Tensor:
        return F.cross_entropy(step.logits, step.targets)


@dataclass(frozen=True)
class BinaryCrossEntropy(Objective):
    """Mean binary cross-entropy of each class by itself, for several classes in one image.

    Equal to ``F.binary_cross_entropy_with_logits(logits, targets)``; the targets are probabilities
    [B, classes] that needn't sum to one, see :func:`smi_fast.targets.multi_targets`.
    """

    weight: float = 1.0
    name: str = "binary_cross_entropy"

    def __call__(self, step: Step) -> Tensor:
        if step.targets.shape != step.logits.shape:
            expected, got = list(step.logits.shape), list(step.targets.shape)
            raise ValueError(f"expected targets as probabilities {expected}, got {got}")
        return F.binary_cross_entropy_with_logits(step.logits, step.targets)


@dataclass(frozen=True)
class TotalVariation(Objective):
    """Total variation of the whole batch, see :func:`smi_fast.ops.total_variation`.

    Args:
        weight: factor; the published l2 one is 1e-4 (arXiv 2510.27186).
        norm: "l2", the sum of four Frobenius norms, or "l1", of four mean absolute differences.

    Raises:
        ValueError: another norm.
    """

    weight: float = 1e-4
    norm: str = "l2"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"expected norm l1 or l2, got {self.norm!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "total_variation" if self.norm == "l2" else "total_variation_l1"

    def __call__(self, step: Step) -> Tensor:
        l1, l2 = ops.total_variation(
            step.images, step.kept, patch_size=step.patch_size, backend=step.backend
        )
        return l1 if self.norm == "l1" else l2


@dataclass(frozen=True)
class L2Norm(Objective):
    """Norm of all pixels of the batch; of those in kept patches while the others are frozen.

    Args:
        weight: factor; DeepInversion's is 1e-5 (arXiv 1912.08795).
        per_image: the mean of the images' norms, as in DeepInversion's code; without it the norm
            of the batch, as in SMI's.
    """

    weight: float = 1e-5
    name: str = "l2_norm"
    per_image: bool = False

    def __call__(self, step: Step) -> Tensor:
        pixels = step.images
        if step.kept is not None:
            # Made on the device: numbers of the host would be copied to it at every step.
            shift, flip = step.kept.new_zeros(2), step.kept.new_zeros((), dtype=torch.bool)
            pixels, _ = ops.gather_patches(
                pixels, step.kept, shift, flip, patch_size=step.patch_size, backend=step.backend
            )
        if not self.per_image:
            pixels = pixels[None]
        norms: Tensor = torch.linalg.vector_norm(pixels.flatten(1), dim=1)
        return norms.mean()


@dataclass(frozen=True)
class UserTerm(Objective):
    """A function ``(images, logits) -> scalar`` as a term; its weight is in what it returns."""

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    weight: float = 1.0

    def __call__(self, step: Step) -> Tensor:
        value = self.function(step.images, step.logits)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected the term {self.name} to return a scalar tensor, got {got}")
        return value.reshape(())


def published_objectives() -> tuple[Objective, ...]:
    """The terms and weights of the published code (arXiv 2510.27186)."""
    return (CrossEntropy(), TotalVariation())


def as_objectives(
    terms: Iterable[Objective | Callable[[Tensor, Tensor], Tensor]],
) -> tuple[Objective, ...]:
    """Terms with names of their own; functions are wrapped in :class:`UserTerm`.

    Raises:
        ValueError: no term at all, or two of one name.
        TypeError: something that is no term.
    """
    objectives = tuple(map(_as_objective, terms))
    names = [objective.name for objective in objectives]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more terms with different names, got {names}")
    return objectives


def _as_objective(term: Objective | Callable[[Tensor, Tensor], Tensor]) -> Objective:
    if isinstance(term, Objective):
        return term
    if callable(term):
        return UserTerm(term, getattr(term, "__name__", type(term).__name__))
    raise TypeError(f"expected a term or a function (images, logits) -> scalar, got {term!r}")
