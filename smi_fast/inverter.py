"""The loop: from noise to images that a frozen teacher takes for given classes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smi_fast.backends import AUTO
from smi_fast.graph import Captured
from smi_fast.iteration import Iteration
from smi_fast.objectives import Objective, UserTerm, as_objectives, published_objectives
from smi_fast.reference import patch_mask, pixel_mask
from smi_fast.result import InversionResult, NonFiniteLoss, Phase
from smi_fast.schedules import Schedule, StopSchedule, still_iterations
from smi_fast.teacher import SparseViT

BACKGROUNDS = ("frozen", "regularized")
FINAL_MASKS = ("kept", "reranked")
# Side of the image over the largest shift, as published.
JITTER_SHARE = 8
# Steps of a captured graph between two looks at what they recorded.
CHECK_EVERY = 50

Callback = Callable[[int, Tensor, Tensor], None]


class SparseInverter:
    """Sparse model inversion of a frozen Vision Transformer.

    Args:
        teacher: a timm ``VisionTransformer``, or a :class:`SparseViT` that wraps one.
        objectives: terms of the loss, or functions ``(images, logits) -> scalar``; by default the
            published ones, cross-entropy + 1e-4 total variation.
        schedule: when patches stop; by default the published stops.
        mean: of each channel, for normalised space; by default from the teacher's
            ``pretrained_cfg``.
        std: likewise.
        iterations: steps of the optimiser.
        lr: learning rate of Adam.
        betas: decay rates of Adam.
        background: "frozen", a stopped patch no longer changes, as the paper says; or
            "regularized", it goes on receiving the image terms' gradient and Adam's momentum, as
            the published code does.
        final_mask: "kept", the patches inverted to the end; or "reranked", as published: the most
            important ones of the final image in a dense forward pass, which that code takes of the
            de-normalised image, and one more of them for the class token.
        backend: which implementation of the ops to use, see :mod:`smi_fast.backends`.

    Raises:
        ValueError: any of these out of range, with what was expected and what came.
        UnsupportedTeacher: the teacher can't be computed exactly on kept patches.
        BackendUnavailable: there is no such backend.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        objectives: Iterable[Objective | Callable[[Tensor, Tensor], Tensor]] | None = None,
        schedule: Schedule | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        iterations: int = 4000,
        lr: float = 0.25,
        betas: tuple[float, float] = (0.5, 0.99),
        background: str = "frozen",
        final_mask: str = "kept",
        backend: str = AUTO,
    ) -> None:
        self.teacher = (
            teacher if isinstance(teacher, SparseViT) else SparseViT(teacher, backend=backend)
        )
        self.objectives = as_objectives(
            published_objectives() if objectives is None else objectives
        )
        self.schedule = StopSchedule() if schedule is None else schedule
        self.mean, self.std = (
            self._channels(name, given) for name, given in (("mean", mean), ("std", std))
        )
        self.iterations, self.lr, self.betas = iterations, lr, betas
        self.background, self.final_mask, self.backend = background, final_mask, backend
        self._check_options()
        self._counts = dict(
            zip(self.schedule.at, self.schedule.counts(self.teacher.num_patches), strict=True)
        )
        self._low, self._high = -self.mean / self.std, (1 - self.mean) / self.std

    def _channels(self, name: str, given: Sequence[float] | None) -> Tensor:
        if given is None:
            given = (getattr(self.teacher.vit, "pretrained_cfg", None) or {}).get(name)
        if given is None:
            raise ValueError(f"the teacher's pretrained_cfg has no {name}: pass {name}=(r, g, b)")
        values = torch.tensor(tuple(given), dtype=torch.float64)
        channels = self.teacher.channels
        if values.shape != (channels,):
            raise ValueError(f"expected {name} of {channels} channels, got {tuple(given)}")
        if name == "std" and (values <= 0).any():
            raise ValueError(f"expected std above 0, got {tuple(given)}")
        return values.to(self.teacher.device, self.teacher.dtype)

    def _check_options(self) -> None:
        choices = (("background", BACKGROUNDS), ("final_mask", FINAL_MASKS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected {name} {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.iterations < 1:
            raise ValueError(f"expected 1 or more iterations, got {self.iterations}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"expected lr above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas in [0, 1), got {self.betas}")
        if self.schedule.at and self.schedule.at[-1] >= self.iterations:
            raise ValueError(
                f"the stop at {self.schedule.at[-1]} is past the end of {self.iterations} "
                "iterations: run more of them, or take StopSchedule.scaled(iterations)"
            )

    def invert(
        self,
        targets: Tensor | Sequence[int],
        *,
        init: Tensor | None = None,
        jitter: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> InversionResult:
        """Inverts one batch; Ctrl-C ends it early and gives back what is done.

        Args:
            targets: class indices [B], or probabilities [B, classes].
            init: first pixels [B, 3, H, W] in normalised space; by default standard normal noise.
            jitter: shift int64 [T, 2] in pixels and flip bool [T] of each iteration; by default
                uniform in an eighth of each side, and every other one mirrored. Around stops there
                is none, whatever is given.
            generator: draws the default ``init`` and then ``jitter``, on the CPU; by default
                torch's own.
            progress: show a progress bar.
            callback: called after each step with the iteration, the images in normalised space and
                the kept patches; both are the loop's own, to be copied when they are to be held on
                to.

        Raises:
            ValueError: targets, init or jitter of the wrong shape, type, range or device.
            NonFiniteLoss: a term or the gradient is infinite or not a number.
        """
        iteration = self.start(targets, init, jitter, generator)
        marks: list[tuple[int, int, float]] = []
        importance, interrupted = None, False
        bar = tqdm(total=self.iterations, disable=not progress, unit="it", dynamic_ncols=True)
        phase = self._captured_phase if self._is_captured() else self._checked_phase
        try:
            for first, end in pairwise((0, *self._counts, self.iterations)):
                if first in self._counts:
                    assert importance is not None
                    count = self._counts[first]
                    iteration.kept = self.schedule.select(iteration.kept, importance, count)
                marks.append((iteration.kept.shape[1], first, time.perf_counter()))
                importance = phase(iteration, range(first, end), bar, callback)
        except KeyboardInterrupt:
            interrupted = True
        except _NonFinite as error:
            result = self._result(iteration, marks, interrupted=True)
            raise NonFiniteLoss(iteration.taken(), str(error), result) from None
        finally:
            bar.close()
        return self._result(iteration, marks, interrupted)

    def start(
        self,
        targets: Tensor | Sequence[int],
        init: Tensor | None = None,
        jitter: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iteration:
        """The state before the first step, from the same arguments as :meth:`invert`."""
        targets = self._check_targets(targets)
        images = self._first_images(init, len(targets), generator)
        shift, flip = self._jitter_table(jitter, generator)
        for objective in self.objectives:
            objective.begin(self.teacher, len(targets), generator)
        return Iteration(
            teacher=self.teacher,
            objectives=self.objectives,
            targets=targets,
            images=images,
            kept=self.teacher.every_patch(len(targets)),
            shift=shift,
            flip=flip,
            mean=self.mean,
            std=self.std,
            lr=self.lr,
            betas=self.betas,
            low=self._low,
            high=self._high,
            freezes=self.background == "frozen",
            backend=self.backend,
        )

    def _checked_phase(
        self, iteration: Iteration, steps: range, bar: tqdm[None], callback: Callback | None
    ) -> Tensor | None:
        """Takes the steps between two stops; returns the importance that the second one reads."""
        importance = None
        for step in steps:
            importance = self._checked_step(iteration, step)
            self._show(bar, iteration, step)
            if callback is not None:
                callback(step, iteration.images, iteration.kept)
        return importance

    def _checked_step(self, iteration: Iteration, step: int) -> Tensor | None:
        gradient, importance = iteration.evaluate(score=step + 1 in self._counts, number=step)
        name = iteration.non_finite(slice(step, step + 1))
        if name is not None:
            raise _NonFinite(name)
        iteration.update(gradient)
        return importance

    def _is_captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph; a plain function may read on the host."""
        plain = any(isinstance(objective, UserTerm) for objective in self.objectives)
        return self.teacher.device.type == "cuda" and not plain

    def _captured_phase(
        self, iteration: Iteration, steps: range, bar: tqdm[None], callback: Callback | None
    ) -> Tensor | None:
        """As :meth:`_checked_phase`, from CUDA graphs and with a look at the record now and then.

        There is one graph for each set of terms that are due in a step. The step before a stop
        scores its patches, which no other does: it is in none.
        """
        graphs: dict[tuple[bool, ...], Captured] = {}
        importance = None
        first, saved = steps.start, iteration.saved()
        for step in steps:
            try:
                if step + 1 in self._counts:
                    importance = iteration(score=True, number=step)
                else:
                    due = tuple(step % term.every == 0 for term in self.objectives)
                    if due not in graphs:
                        take = partial(iteration, number=step)
                        graphs[due] = Captured(take, self.teacher.device)
                    graphs[due]()
                if callback is not None:
                    callback(step, iteration.images, iteration.kept)
            except KeyboardInterrupt:
                self._settle(iteration, first, saved)
                raise
            if step + 1 == steps.stop or (step + 1 - steps.start) % CHECK_EVERY == 0:
                again = self._settle(iteration, first, saved)
                importance = importance if again is None else again
                self._show(bar, iteration, step)
                first, saved = step + 1, iteration.saved()
        return importance

    def _settle(self, iteration: Iteration, first: int, saved: list[Tensor]) -> Tensor | None:
        """Takes the steps since a copy of the state again, one by one, if not all were finite."""
        end, importance = iteration.taken(), None
        if iteration.non_finite(slice(first, end)) is not None:
            iteration.restore(saved)
            for step in range(first, end):
                importance = self._checked_step(iteration, step)
        return importance

    def _show(self, bar: tqdm[None], iteration: Iteration, step: int) -> None:
        if not bar.disable:
            rate = (bar.format_dict["rate"] or 0) * len(iteration.images) / self.iterations
            bar.set_postfix_str(
                f"{self.objectives[0].name} {iteration.record[step, 0]:.3f}, "
                f"kept {iteration.kept.shape[1]}, {rate:.3g} images/s",
                refresh=False,
            )
        bar.update(step + 1 - bar.n)

    @torch.no_grad()
    def _result(
        self, iteration: Iteration, marks: list[tuple[int, int, float]], interrupted: bool
    ) -> InversionResult:
        teacher, pixels, kept = self.teacher, iteration.images, iteration.kept
        ends = [*(mark[1:] for mark in marks[1:]), (iteration.taken(), time.perf_counter())]
        timing = tuple(
            Phase(patches, end - first, stop - start)
            for (patches, first, start), (end, stop) in zip(marks, ends, strict=False)
        )
        logits = teacher(pixels, kept).logits
        images = (pixels * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)
        shown = kept
        if self.final_mask == "reranked":
            tokens = teacher.num_patches + teacher.num_prefix_tokens
            count = min(int(tokens * self.schedule.remaining), teacher.num_patches)
            importance = teacher(images, importance=True).importance
            assert importance is not None
            shown = importance.topk(count, dim=1).indices
        visible = pixel_mask(shown, teacher.patch_size, *teacher.image_size)
        return InversionResult(
            images,
            kept,
            patch_mask(shown, *teacher.grid),
            images * visible,
            iteration.targets,
            logits,
            iteration.history(),
            timing,
            iteration.taken(),
            interrupted,
        )

    def _check_targets(self, targets: Tensor | Sequence[int]) -> Tensor:
        given, classes = torch.as_tensor(targets), self.teacher.num_classes
        if isinstance(targets, Tensor) and targets.device != self.teacher.device:
            raise ValueError(
                f"expected targets on {self.teacher.device}, as the teacher, got {targets.device}"
            )
        if given.dim() == 1 and not given.is_floating_point() and given.dtype != torch.bool:
            if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < classes:
                raise ValueError(
                    f"expected targets in 0..{classes - 1}, "
                    f"got {int(given.min())}..{int(given.max())}"
                )
            return given.to(self.teacher.device, torch.int64)
        if given.dim() == 2 and given.is_floating_point() and given.shape[1] == classes:
            return given.to(self.teacher.device, self.teacher.dtype)
        raise ValueError(
            f"expected targets as whole numbers [B] or probabilities [B, {classes}], "
            f"got {given.dtype} {list(given.shape)}"
        )

    def _first_images(
        self, init: Tensor | None, batch: int, generator: torch.Generator | None
    ) -> Tensor:
        teacher = self.teacher
        shape = (batch, teacher.channels, *teacher.image_size)
        if init is None:
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            return noise.to(teacher.device, teacher.dtype)
        if init.shape != shape or not init.is_floating_point() or init.device != teacher.device:
            raise ValueError(
                f"expected init as floating point {list(shape)} on {teacher.device}, "
                f"got {init.dtype} {list(init.shape)} on {init.device}"
            )
        return init.detach().to(teacher.dtype, copy=True).contiguous()

    def _jitter_table(
        self, jitter: tuple[Tensor, Tensor] | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Shift and flip of each step; around stops there is neither."""
        count, device = self.iterations, self.teacher.device
        if jitter is None:
            jitter = random_jitter(count, self.teacher.image_size, generator)
        shift, flip = jitter
        if shift.shape != (count, 2) or shift.dtype != torch.int64:
            raise ValueError(
                f"expected shift int64 [{count}, 2], got {shift.dtype} {list(shift.shape)}"
            )
        if flip.shape != (count,) or flip.dtype != torch.bool:
            raise ValueError(f"expected flip bool [{count}], got {flip.dtype} {list(flip.shape)}")
        still = sorted(still_iterations(self.schedule))
        shift, flip = shift.to(device, copy=True), flip.to(device, copy=True)
        shift[still], flip[still] = 0, False
        return shift, flip


def random_jitter(
    iterations: int, image_size: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Shift int64 [iterations, 2], up to an eighth of each side, and flip bool [iterations]."""
    limits = [side // JITTER_SHARE for side in image_size]
    shift = torch.stack(
        [torch.randint(-m, m + 1, (iterations,), generator=generator) for m in limits], dim=1
    )
    return shift, torch.rand(iterations, generator=generator) < 0.5


def invert(
    teacher: nn.Module,
    targets: Tensor | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
    **options: object,
) -> InversionResult:
    """Inverts one batch: ``SparseInverter(teacher, **options).invert(targets)``.

    Args:
        teacher: a timm ``VisionTransformer``.
        targets: class indices [B], or probabilities [B, classes].
        generator: draws the noise and the jitter.
        progress: show a progress bar.
        **options: of :class:`SparseInverter`.
    """
    inverter = SparseInverter(teacher, **options)  # type: ignore[arg-type]
    return inverter.invert(targets, generator=generator, progress=progress)


class _NonFinite(Exception):
    """Leaves the loop with the name of what is not finite."""
