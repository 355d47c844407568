"""What an iteration sees of the images: copies with a view each, in parts that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smi_fast.augmentations import apply
from smi_fast.importance import ScoreInputs, score
from smi_fast.inversion.settings import Settings
from smi_fast.inversion.sparse_images import confidence
from smi_fast.objectives import LossInputs, Objective, value_of
from smi_fast.ops.collected import collected
from smi_fast.ops.constants import constant
from smi_fast.teacher import SigmoidImages, SparseOutput
from smi_fast.teacher.taps import blocks_read


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchInputs:
    """What an iteration reads besides the images, for the whole batch.

    Attributes:
        targets: [B, ...] or None.
        kept: int64 [B, K], the patches that the teacher computes.
        active: int64 [B, K], the patches whose pixels change, or None when all pixels change.
        lengths: int64 [B], how many of ``kept`` count in each image, or None where all do.
        shift: int64 [2] in pixels, or [B, 2] for each image; with R copies [R, 2] or [R, B, 2].
        flip: bool, likewise without the last axis.
        iteration: from 0, as a number of the host; None where images may be at different ones.
        iteration_tensor: int64 [], the same number on the images' device, or None.
        generator: on the images' device, for ``augment``.
        score: whether to score the importance of kept patches.
        rows: int64 [B], which images of the whole batch these are; None for all, in order.
        share: of the whole batch that these images are. The loss is multiplied by it, so that the
            gradient of an image doesn't depend on how many others are at work.
    """

    targets: Tensor | None
    kept: Tensor
    active: Tensor | None
    lengths: Tensor | None = None
    shift: Tensor
    flip: Tensor
    iteration: int | None
    iteration_tensor: Tensor | None
    generator: torch.Generator | None
    score: bool
    rows: Tensor | None = None
    share: float = 1.0


class Evaluation(NamedTuple):
    """What an iteration finds.

    Attributes:
        values: the un-weighted objectives.
        gradient: [B, C, H, W], of the images or of their field; None when no objective depends on
            them.
        importance: [B, K], or None.
        augmented: 0, or NaN where ``augment`` returned what isn't finite; empty without it.
        confidence: [B], the probability of the targets, with ``finish``; else None.
    """

    values: list[Tensor]
    gradient: Tensor | None
    importance: Tensor | None
    augmented: list[Tensor]
    confidence: Tensor | None


def evaluate(images: Tensor | SigmoidImages, inputs: BatchInputs, settings: Settings) -> Evaluation:
    """Evaluate the objectives; all that is returned is the mean over the copies of each image.

    Args:
        images: [B, C, H, W], normalised; or, without ``augment``, what they are computed from. The
            gradient ends at them.
        inputs: what else the iteration reads.
        settings: of the inversion.

    Raises:
        ValueError: an objective isn't a scalar, or ``augment`` returns other images than it may.
    """
    copies = [_copy(images, inputs, settings, index) for index in range(settings.copies)]
    return Evaluation(
        [_mean(values) for values in zip(*(copy.values for copy in copies), strict=True)],
        _joined(_mean, [copy.gradient for copy in copies]),
        _joined(_mean, [copy.importance for copy in copies]),
        [_mean(flags) for flags in zip(*(copy.augmented for copy in copies), strict=True)],
        _joined(_mean, [copy.confidence for copy in copies]),
    )


def parts(batch: int, most: int | None) -> list[slice]:
    """Slices of a batch, as few and as equal as can be, of at most ``most`` images each."""
    count = 1 if most is None else max(1, math.ceil(batch / most))
    return [slice(*ends) for ends in pairwise(batch * i // count for i in range(count + 1))]


def _copy(
    images: Tensor | SigmoidImages, inputs: BatchInputs, settings: Settings, index: int
) -> Evaluation:
    """Evaluate one copy of each image, with a jitter and an augmentation of its own."""
    jitter = inputs.shift, inputs.flip
    if settings.copies > 1:
        jitter = inputs.shift[index], inputs.flip[index]
    slices = parts(len(images), settings.max_batch)
    if settings.augment is None:
        found = [_part(rows, images, None, jitter, inputs, settings) for rows in slices]
        gradient = _joined(torch.cat, [part.gradient for part in found])
        return Evaluation(_sums(found), gradient, _importance(found), [], _confidence(found))
    assert inputs.generator is not None and isinstance(images, Tensor)
    assert inputs.iteration_tensor is not None
    whole = images.detach().requires_grad_()
    progress = inputs.iteration_tensor.to(torch.float32) / settings.iterations
    seen = apply(settings.augment, whole, progress, inputs.generator)
    found = [_part(rows, images, seen.detach(), jitter, inputs, settings) for rows in slices]
    gradient = _joined(torch.cat, [part.gradient for part in found])
    of_seen = _joined(torch.cat, [part.of_seen for part in found])
    if of_seen is not None:
        # The parts end at the augmented images, so that augment is differentiated once.
        (through,) = torch.autograd.grad(seen, whole, of_seen)
        gradient = through if gradient is None else gradient + through
    finite = [(seen.detach() * 0).sum()]
    return Evaluation(_sums(found), gradient, _importance(found), finite, _confidence(found))


class _Part(NamedTuple):
    """What a part of a copy contributes to the batch.

    Attributes:
        values: the un-weighted objectives, times the part's share of the batch.
        gradient: [b, C, H, W], of the part's images or of their field, or None.
        of_seen: [b, C, H, W], of its augmented images, or None.
        importance: [b, K], or None.
        confidence: [b], or None.
    """

    values: list[Tensor]
    gradient: Tensor | None
    of_seen: Tensor | None
    importance: Tensor | None
    confidence: Tensor | None


def _part(
    rows: slice,
    images: Tensor | SigmoidImages,
    seen: Tensor | None,
    jitter: tuple[Tensor, Tensor],
    inputs: BatchInputs,
    settings: Settings,
) -> _Part:
    teacher, batch = settings.teacher, len(images)
    own, leaf = _leaf(images, rows)
    view = None if seen is None else seen[rows].requires_grad_()
    shift, flip = jitter
    if shift.dim() == 2:
        shift, flip = shift[rows], flip[rows]
    pairs = [*zip(settings.objectives, settings.due(inputs.iteration or 0), strict=True)]
    taps = {tap for objective, due in pairs if due for tap in objective.taps(teacher.depth)}
    scored = settings.importance.taps(teacher.depth) if inputs.score else ()
    kept, lengths = inputs.kept[rows], None if inputs.lengths is None else inputs.lengths[rows]
    targets = None if inputs.targets is None else inputs.targets[rows]
    own_rows = rows if inputs.rows is None else inputs.rows[rows]
    until = None
    if not inputs.score and settings.finish is None and not _logits_are_read(pairs):
        until = blocks_read(taps, teacher.depth)
    with collected(leaf) as collector:
        output = teacher(
            own if view is None else view,
            kept,
            jitter=(shift, flip),
            importance=inputs.score,
            taps={*taps, *scored},
            until=until,
            # Without logits there are no taps either, see check_ragged.
            lengths=lengths if until is None else None,
        )
        given = LossInputs(
            images=own if isinstance(own, Tensor) else own.tensor,
            view=view,
            logits=output.logits,
            targets=targets,
            kept=kept,
            active=None if inputs.active is None else inputs.active[rows],
            lengths=lengths,
            teacher=teacher,
            space=settings.space,
            backend=settings.backend,
            rows=own_rows,
            iteration=inputs.iteration,
            iteration_tensor=inputs.iteration_tensor,
            jitter=(shift, flip),
            taps=output.taps,
        )
        values = [
            value_of(objective, given) if due else leaf.new_zeros(()) for objective, due in pairs
        ]
    if len(own) < batch:
        values = [value * (len(own) / batch) for value in values]
    leaves = [leaf] if view is None else [leaf, view]
    of_taps = [output.taps[name] for name in scored if settings.importance.differentiates]
    weights = [
        _weight(*pair, inputs.share) for pair in zip(settings.objectives, values, strict=True)
    ]
    with collector.collecting():
        found = _gradients(values, weights, [*leaves, *of_taps])
    found[0] = collector.gradient(found[0])
    importance = None
    if output.importance is not None:
        gradients = dict(zip(scored, found[len(leaves) :], strict=False))
        shown = given.images if view is None else view
        importance = _score(own_rows, shown, kept, output, gradients, settings)
    of_seen = None if view is None else found[1]
    sure = None
    if settings.finish is not None:
        assert output.logits is not None
        sure = confidence(output.logits.detach(), targets)
    return _Part([value.detach() for value in values], found[0], of_seen, importance, sure)


def _logits_are_read(pairs: list[tuple[Objective, bool]]) -> bool:
    return any(due and objective.reads_logits for objective, due in pairs)


def _leaf(images: Tensor | SigmoidImages, rows: slice) -> tuple[Tensor | SigmoidImages, Tensor]:
    """Some of the images, and the leaf that their gradient ends at: themselves or their field."""
    if isinstance(images, Tensor):
        leaf = images[rows].detach().requires_grad_()
        return leaf, leaf
    leaf = images.field[rows].detach().requires_grad_()
    return images.part(rows, leaf), leaf


def _score(
    rows: slice | Tensor,
    view: Tensor,
    kept: Tensor,
    output: SparseOutput,
    gradients: dict[str, Tensor | None],
    settings: Settings,
) -> Tensor:
    """The importance [b, K] of a part's kept patches."""
    assert output.importance is not None
    inputs = ScoreInputs(
        view=view.detach(),
        kept=kept,
        attention=output.importance,
        teacher=settings.teacher,
        taps=output.taps,
        gradients=gradients,
        rows=rows,
    )
    return score(settings.importance, inputs)


def _weight(objective: Objective, value: Tensor, share: float) -> Tensor:
    """The factor of an objective's value in the loss, with the value's data type and device."""
    given: Any = objective.weight  # a number, or a tensor that its owner may change
    weight: Tensor = given.to(value) if isinstance(given, Tensor) else constant(given, value)
    weight = weight.reshape(())
    return weight if share == 1 else weight * share


def _gradients(
    values: list[Tensor], weights: list[Tensor], tensors: list[Tensor]
) -> list[Tensor | None]:
    """Gradients, for tensors, of the sum of weights times values; None where that depends on none.

    Nothing reads the sum itself, which would cost several kernels.
    """
    terms = [pair for pair in zip(values, weights, strict=True) if pair[0].requires_grad]
    if not terms:
        return [None] * len(tensors)
    values, weights = map(list, zip(*terms, strict=True))
    return [*torch.autograd.grad(values, tensors, weights, allow_unused=True)]


def _sums(found: list[_Part]) -> list[Tensor]:
    return [reduce(torch.add, values) for values in zip(*(p.values for p in found), strict=True)]


def _importance(found: list[_Part]) -> Tensor | None:
    return _joined(torch.cat, [part.importance for part in found])


def _confidence(found: list[_Part]) -> Tensor | None:
    return _joined(torch.cat, [part.confidence for part in found])


def _joined(join: Callable[[list[Tensor]], Tensor], tensors: list[Tensor | None]) -> Tensor | None:
    """One tensor of several, or None where there are none."""
    there = [tensor for tensor in tensors if tensor is not None]
    if len(there) < len(tensors):
        return None
    return there[0] if len(there) == 1 else join(there)


def _mean(copies: Sequence[Tensor]) -> Tensor:
    return copies[0] if len(copies) == 1 else torch.stack([*copies]).mean(0)
