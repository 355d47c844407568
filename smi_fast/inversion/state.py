"""The state of an inversion, and one iteration on tensors that stay in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.augmentations import name_of
from smi_fast.inversion.result import FinishedGroup
from smi_fast.inversion.settings import Settings
from smi_fast.inversion.sizes import enlarged_parameters
from smi_fast.inversion.tables import rows_at
from smi_fast.inversion.views import BatchInputs, evaluate, parts
from smi_fast.ops.grid import first, patch_mask, spread
from smi_fast.schedules import Selection
from smi_fast.teacher import SigmoidImages


class Gradient(NamedTuple):
    """What an iteration finds.

    Attributes:
        parameters: [B, C, ...], the gradient of the parameters.
        importance: [B, K], or None.
        confidence: [B], the probability of the targets, with ``finish``; else None.
    """

    parameters: Tensor
    importance: Tensor | None
    confidence: Tensor | None


@dataclass(kw_only=True, eq=False)
class InversionState:
    """The state of an inversion; :meth:`step` takes one iteration.

    An iteration doesn't wait for the device, copies nothing to it, and no shape in it depends on
    data: it can be captured in a CUDA graph and replayed. What differs from one iteration to the
    next is read from row ``iteration`` of tables on the device.

    Attributes:
        settings: what decides the inversion.
        targets: [B, ...], or None where no objective reads them.
        parameters: [B, C, ...], moved by the optimiser.
        kept: int64 [B, K], the patches that the teacher computes; :meth:`keep` replaces them.
        shift: int64 [T, 2], in pixels, of each iteration; [T, B, 2] for each image. With R copies
            [T, R, 2] or [T, R, B, 2].
        flip: bool, likewise without the last axis.
        lengths: int64 [B], how many of ``kept`` count in each image; None where all do.
        generator: on the device; draws what ``augment`` asks for. None without ``augment``.
        background: images [B, C, H, W] as they were at the last stop, where the parametrization
            can't freeze them itself.
        frozen: bool [B, rows, columns], the patches that show the background; None without one.
        finished: groups of patches that a schedule took out, in the order of their stops.
        exp_avg: [B, C, ...], Adam's running mean of the gradient.
        exp_avg_sq: [B, C, ...], Adam's running mean of its square.
        rows: int64 [B], which images of the whole batch these are; None for all, in order.
        whole: number of images of the whole batch.
        groups: number of images in each of G groups, which follow each other. The images of a group
            are at the same iteration.
        iteration: int64 [G], iterations done by each group; of a whole batch, one.
        record: float32 or float64 [T, objectives + 1], in each iteration the un-weighted objectives
            and the sum of the gradient; with ``augment`` before them NaN where its images aren't
            finite.
    """

    settings: Settings
    targets: Tensor | None
    parameters: Tensor
    kept: Tensor
    shift: Tensor
    flip: Tensor
    lengths: Tensor | None = field(init=False, default=None)
    generator: torch.Generator | None = None
    background: Tensor | None = field(init=False, default=None)
    frozen: Tensor | None = field(init=False, default=None)
    finished: list[FinishedGroup] = field(init=False, default_factory=list)
    rows: Tensor | None = field(init=False, default=None)
    whole: int = field(init=False)
    groups: tuple[int, ...] = field(init=False)
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    iteration: Tensor = field(init=False)
    record: Tensor = field(init=False)
    _begun: Tensor | None = field(init=False, default=None)
    # The learning rate [1] of the iteration that was evaluated and not yet taken.
    _lr: Tensor | None = field(init=False, default=None)
    # The lengths as numbers of the host.
    _numbers: list[int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._begin()
        self.groups = (len(self.kept),)
        self.whole = len(self.kept)
        self.iteration = torch.zeros(1, dtype=torch.int64, device=self.parameters.device)
        augment, objectives = self.settings.augment, self.settings.objectives
        self._names = [] if augment is None else [f"augment {name_of(augment)}"]
        self._names += [*(objective.name for objective in objectives), "gradient"]
        columns = len(self._names)
        # In the data type of values, so that none is converted; half precision is too coarse.
        dtype = torch.promote_types(self.parameters.dtype, torch.float32)
        self.record = self.parameters.new_zeros(len(self.shift), columns, dtype=dtype)

    def _begin(self) -> None:
        """Begin to move the parameters, with moments of 0."""
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.parameters) for _ in range(2))
        bounds = self.settings.parametrization.bounds()
        self._low, self._high = (bound.to(self.parameters) for bound in bounds)

    @property
    def active(self) -> Tensor | None:
        """int64 [B, K], the patches whose pixels change; None when all pixels change.

        Where images have numbers of patches of their own, the first patch of an image repeats.
        """
        if self.lengths is not None and self.settings.freeze_background:
            return torch.where(first(self.kept, self.lengths), self.kept, self.kept[:, :1])
        sparse = self.kept.shape[1] < self.settings.teacher.num_patches
        return self.kept if self.settings.freeze_background and sparse else None

    @torch.no_grad()
    def images(self) -> Tensor:
        """[B, C, H, W] in normalised space; of ``Pixels`` the parameters themselves."""
        return _tensor(self._images(self.parameters))

    def _images(self, parameters: Tensor) -> Tensor | SigmoidImages:
        # Autocast rounds products of the teacher, but not what the optimiser moves.
        with torch.autocast(parameters.device.type, enabled=False):
            images = self.settings.parametrization.lazy_images(parameters)
        if self.background is None or self.frozen is None:
            return images
        if isinstance(images, SigmoidImages):
            return images.over(self.background, self.frozen)
        mask = spread(self.frozen, self.settings.teacher.patch_size)
        return torch.where(mask, self.background, images)

    @torch.no_grad()
    def keep(self, selection: Selection) -> None:
        """Take a stop: from now on the teacher computes ``selection.kept`` only."""
        settings = self.settings
        if selection.finished is not None:
            self.finished.append(self._finish(selection.finished))
        if settings.freeze_background and not settings.parametrization.pixelwise:
            self.background = self.images().clone()
            self.frozen = ~patch_mask(selection.kept, *settings.teacher.grid, selection.lengths)
        self.kept = selection.kept
        self.set_lengths(selection.lengths)

    def set_lengths(self, lengths: Tensor | None) -> None:
        """Let only the first ones of ``kept`` count in each image, int64 [B]; None for all."""
        self.lengths = lengths
        self._numbers = None if lengths is None else lengths.tolist()

    @torch.no_grad()
    def enlarge(self, settings: Settings, kept: Tensor) -> None:
        """Take a stop at which images grow: Adam begins anew from the enlarged images.

        Args:
            settings: of the larger size.
            kept: int64 [B, K] of its grid.
        """
        self.parameters = enlarged_parameters(settings, self.images())
        self.settings = settings
        self._begun = self.iteration.clone()
        self._begin()
        self.background = self.frozen = None
        self.kept = kept
        if kept.shape[1] < settings.teacher.num_patches:
            self.keep(Selection(kept))

    def _finish(self, patches: Tensor) -> FinishedGroup:
        settings, images = self.settings, self.images()
        pixels, _ = ops.gather_patches(
            settings.space.denormalize(images),
            patches,
            patch_size=settings.teacher.patch_size,
            backend=settings.backend,
        )
        return FinishedGroup(self.done(), patches, pixels, self.logits(images, patches))

    def logits(self, images: Tensor, kept: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The logits [B, classes] of the patches ``kept`` alone, without jitter."""
        found = []
        for row in parts(len(kept), self.settings.max_batch):
            own = None if lengths is None else lengths[row]
            found.append(self.settings.teacher(images[row], kept[row], lengths=own).logits)
        return torch.cat(found)

    def step(self, *, score: bool = False, number: int = 0) -> Tensor | None:
        """Take one iteration.

        Args:
            score: whether to score the importance of kept patches.
            number: of the iteration. It only decides which objectives with ``every > 1`` are
                evaluated, so one captured graph serves all iterations that evaluate the same ones.

        Returns:
            importance [B, K] with ``score``, else None.
        """
        found = self.evaluate(score=score, number=number)
        self.update(found.parameters)
        return found.importance

    def evaluate(self, *, score: bool = False, number: int = 0) -> Gradient:
        """Record the objectives, and find the gradient of the parameters.

        Raises:
            ValueError: no objective depends on the images, one isn't a scalar, or ``augment``
                returns other images than it may.
        """
        settings = self.settings
        parameters = self.parameters.detach().requires_grad_()
        images = self._images(parameters)
        if settings.augment is not None:
            images = _tensor(images)
        shift, flip = self._jitter()
        inputs = BatchInputs(
            targets=self.targets,
            kept=self.kept,
            active=self.active,
            lengths=self.lengths,
            shift=shift,
            flip=flip,
            iteration=number if settings.finish is None else None,
            iteration_tensor=self.iteration[0] if settings.finish is None else None,
            generator=self.generator,
            score=score,
            rows=self.rows,
            share=len(self.kept) / self.whole if self.whole else 1.0,
        )
        seen = evaluate(images, inputs, settings)
        if seen.gradient is None:
            # In an iteration without an evaluated objective the pixels only follow their momentum.
            if all(settings.due(number)):
                names = ", ".join(objective.name for objective in settings.objectives)
                raise ValueError(
                    f"no objective depends on the images: the gradient of {names} was cut off, as "
                    "by .detach(), .item() or torch.no_grad()"
                )
            gradient = torch.zeros_like(parameters)
        else:
            moved = images.field if isinstance(images, SigmoidImages) else images
            (gradient,) = torch.autograd.grad(moved, parameters, seen.gradient)
        with torch.no_grad():
            row = torch.stack([*seen.augmented, *seen.values, gradient.sum()])
            rows = row.to(self.record.dtype).expand(len(self.groups), -1)
            self.record.index_copy_(0, self.iteration, rows)
        return Gradient(gradient, seen.importance, seen.confidence)

    def update(self, gradient: Tensor) -> None:
        """Move the parameters along their gradient."""
        settings = self.settings
        lr, self._lr = self._lr, None
        if lr is None:
            lr = settings.lr.index_select(0, self.iteration)
        self.iteration.add_(1)
        # Updates of the parameters since their moments were 0.
        step = self.iteration if self._begun is None else self.iteration - self._begun
        tensors = (self.parameters, gradient, self.exp_avg, self.exp_avg_sq)
        pixelwise = settings.parametrization.pixelwise
        if not pixelwise:
            tensors = tuple(tensor.flatten(2)[:, :, None] for tensor in tensors)  # type: ignore[assignment]
        adam = partial(
            ops.adam_clamp_,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            low=self._low,
            high=self._high,
            patch_size=settings.teacher.patch_size if pixelwise else 1,
            backend=settings.backend,
        )
        for group, rows in enumerate(self._slices()):
            for own, active in self._moved(rows):
                adam(
                    *(tensor[own] for tensor in tensors),
                    active=active,
                    step=step[group],
                    lr=lr[group],
                )

    def _slices(self) -> Iterator[slice]:
        """The images of each group."""
        for ends in pairwise(accumulate(self.groups, initial=0)):
            yield slice(*ends)

    def _moved(self, rows: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """Images of a group, and their patches that move; None where all parameters do."""
        settings = self.settings
        pixelwise = settings.parametrization.pixelwise
        if self._numbers is None or not pixelwise or not settings.freeze_background:
            active = self.active if pixelwise else None
            yield rows, None if active is None else active[rows]
            return
        for index in range(rows.start, rows.stop):
            own = slice(index, index + 1)
            yield own, self.kept[own, : self._numbers[index]]

    def _jitter(self) -> tuple[Tensor, Tensor]:
        """The shift and flip of this iteration, as a row of their tables; or those of each image,
        at its own iteration, of groups.
        """
        if len(self.groups) == 1:
            tables = self.shift, self.flip, self.settings.lr
            shift, flip, self._lr = rows_at(tables, self.iteration, self.settings.backend)
            return shift[0], flip[0]
        image = torch.arange(len(self.kept), device=self.kept.device)
        size = torch.tensor(self.groups, device=self.kept.device)
        at = self.iteration.repeat_interleave(size)
        shift = self.shift.movedim(-2, 1)[at, image].movedim(0, -2)
        flip = self.flip.movedim(-1, 1)[at, image].movedim(0, -1)
        return shift, flip

    @property
    def _moving(self) -> tuple[Tensor, ...]:
        return self.parameters, self.exp_avg, self.exp_avg_sq, self.iteration

    def save(self) -> list[Tensor]:
        """A copy of everything that an iteration changes, apart from the record."""
        copies = [tensor.clone() for tensor in self._moving]
        return copies if self.generator is None else [*copies, self.generator.get_state()]

    def restore(self, saved: list[Tensor]) -> None:
        """Go back to the state that :meth:`save` copied."""
        for tensor, copy in zip(self._moving, saved, strict=False):
            tensor.copy_(copy)
        if self.generator is not None:
            self.generator.set_state(saved[-1])

    def non_finite(self, iterations: slice) -> str | None:
        """What is not finite in one of the iterations: augment, an objective, or "gradient".

        The host waits for the device here, as in :meth:`done` and :meth:`history`.
        """
        for row in self.record[iterations].tolist():
            for name, number in zip(self._names, row, strict=True):
                if not math.isfinite(number):
                    return name
        return None

    def done(self) -> int:
        """Iterations done; of groups, by the oldest."""
        return int(self.iteration.max())

    def history(self, iterations: int) -> dict[str, list[float]]:
        """The un-weighted value of each objective in each of the first iterations."""
        names = [objective.name for objective in self.settings.objectives]
        columns = self.record[:iterations, -1 - len(names) : -1].T.tolist()
        return dict(zip(names, columns, strict=True))


def _tensor(images: Tensor | SigmoidImages) -> Tensor:
    return images.tensor() if isinstance(images, SigmoidImages) else images
