"""SparseInverter: from noise to images that a frozen teacher takes for given classes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from smi_fast.augmentations import Augment
from smi_fast.early_finish import EarlyFinish
from smi_fast.importance import Scores, as_importance
from smi_fast.inversion.cuda_graph import graphs_allowed
from smi_fast.inversion.ending import Ending, result_of
from smi_fast.inversion.graphs import Graphs
from smi_fast.inversion.inputs import (
    as_sparse,
    as_targets,
    check_generator,
    check_numbers,
    check_weights,
    first_parameters,
    image_space,
    one_of,
    weight_decay_of,
)
from smi_fast.inversion.loop import Callback, Loop, NonFinite
from smi_fast.inversion.progress import Progress
from smi_fast.inversion.ragged import check_ragged
from smi_fast.inversion.result import InversionResult, NonFiniteLoss, Phase
from smi_fast.inversion.settings import Settings
from smi_fast.inversion.sizes import at_size, begin, check_sizes, scale_shift
from smi_fast.inversion.state import InversionState
from smi_fast.inversion.turnover import Turnover, check_finish, refuse_callback
from smi_fast.inversion.view_inputs import (
    check_augmented,
    check_jitter,
    check_views,
    jitter_table,
    on_device,
)
from smi_fast.jitter import Jitter
from smi_fast.learning_rate import Rates, rate_table
from smi_fast.objectives import CrossEntropy, Objective, as_objectives
from smi_fast.ops.backends import AUTO
from smi_fast.parametrizations import Fourier, Parametrization
from smi_fast.schedules import Schedule, Stop, StopSchedule, bound, check, promised, sizes_of
from smi_fast.teacher import SparseViT

BACKGROUNDS = ("frozen", "regularized")
FINAL_MASKS = ("kept", "reranked")

Terms = Iterable[Objective | Callable[[Tensor, Tensor], Tensor]]


class SparseInverter:
    """Sparse model inversion of a frozen Vision Transformer.

    Its options are decided once; other ones need another inverter. By default they are those of
    :func:`smi_fast.recipes.clear`; ``**recipes.smi().options()`` are the published ones.

    >>> inverter = SparseInverter(teacher, iterations=20, schedule=Dense())
    >>> result = inverter.invert([3, 5], progress=False)
    >>> result.images.shape
    torch.Size([2, 3, 64, 64])

    Args:
        teacher: a timm ``VisionTransformer``, or a :class:`SparseViT` that wraps one.
        objectives: terms of the loss, or functions ``(images, logits) -> scalar``; by default
            cross-entropy.
        schedule: when patches stop, or leave as finished images (:class:`PatchRebirth`); by default
            they stop once, after a tenth of the iterations, when 47 % of them stay:
            ``StopSchedule.once(iterations)``.
        importance: what a schedule ranks kept patches by: "attention", "rollout", "gradient" or
            "random", these with "smoothed-" before them, or a function of their own kind; see
            :mod:`smi_fast.importance`.
        parametrization: what the optimiser moves; by default a Fourier series.
        mean: of each channel, for normalised space; by default from the teacher's
            ``pretrained_cfg``.
        std: likewise.
        iterations: T, iterations of the optimiser.
        lr: learning rate: a number, a :class:`LearningRate` such as :class:`Cosine`, or one number
            for each of T iterations. All are above 0.
        betas: decay rates of Adam.
        optimizer: "adam"; or "adamw", with decoupled weight decay as in ``torch.optim.AdamW``.
        weight_decay: of "adamw" only; by default torch's, 0.01.
        jitter: how far images are shifted, and whether they are mirrored, in each iteration; by
            default up to an eighth of each side, and half of the time mirrored, each image by
            itself: ``Jitter(per_image=True)``. Around stops there is none.
        augment: what changes the images before the teacher sees them, a function ``(images,
            progress, generator) -> images`` such as :class:`smi_fast.augmentations.GaussianNoise`;
            see :data:`smi_fast.augmentations.Augment`. Pixel objectives read the images as they
            are. By default none.
        copies: R, views of each image in an iteration, each with a jitter and an augmentation of
            its own. Objectives, gradients and importance are their mean.
        max_batch: the most images that the teacher computes at once. A larger batch is split into
            parts, with the same result up to rounding; by default it isn't. With ``finish`` it is
            the most images at work: others wait until a place is free.
        finish: when an image is finished before the last iteration, and leaves its place to others;
            by default none is. Images are then at iterations of their own: objectives must treat
            each image alone and all iterations alike, without ``augment``, and the schedule must
            take no image out at a stop and keep their size. No CUDA graph is captured.
        background: "frozen", a stopped patch no longer changes, as the paper says; or
            "regularized", it goes on receiving the gradient of pixel objectives and Adam's
            momentum, as the published code does.
        final_mask: "kept", the patches inverted to the end; or "reranked", as published: the most
            important ones of the final image in a dense forward pass, which that code takes of the
            de-normalised image, and one more of them for the class token. It goes by attention,
            whatever the importance is.
        backend: which implementation of the ops to use, see :mod:`smi_fast.ops.backends`.
        precision: of the teacher's matrix products, as of :class:`SparseViT`. By default that of a
            teacher that is a SparseViT already, and float32 otherwise.
        graph: capture iterations on CUDA in CUDA graphs, which serve later batches too. With False,
            or ``SMI_FAST_GRAPH=0`` in the environment, they run one by one, with the same results.

    Raises:
        ValueError: any of these out of range, with what was expected and what came; a teacher in
            float16 or without weights; or another precision than that of a given SparseViT.
        TypeError: an objective, a schedule, a parametrization, a jitter or an augmentation that
            isn't one.
        UnsupportedTeacher: the teacher can't be computed exactly on kept patches.
        BackendUnavailable: there is no such backend, or none that runs this teacher in this
            precision.
    """

    @torch.inference_mode(False)  # so that autograd may save constants that are made here
    def __init__(
        self,
        teacher: nn.Module,
        *,
        objectives: Terms | None = None,
        schedule: Schedule | None = None,
        importance: Scores = "attention",
        parametrization: Parametrization | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        iterations: int = 100,
        lr: Rates = 0.12,
        betas: tuple[float, float] = (0.5, 0.99),
        optimizer: str = "adam",
        weight_decay: float | None = None,
        jitter: Jitter | None = None,
        augment: Augment | None = None,
        copies: int = 1,
        max_batch: int | None = None,
        finish: EarlyFinish | None = None,
        background: str = "frozen",
        final_mask: str = "kept",
        backend: str = AUTO,
        precision: str | None = None,
        graph: bool = True,
    ) -> None:
        sparse = as_sparse(teacher, backend, precision)
        check_weights(sparse)
        check_numbers(iterations, betas)
        terms = (CrossEntropy(),) if objectives is None else objectives
        parametrization = Fourier() if parametrization is None else parametrization
        if not isinstance(parametrization, Parametrization):
            raise TypeError(f"expected a parametrization, Fourier(), got {parametrization!r}")
        space = image_space(sparse, mean, std)
        given = as_objectives(terms)
        check_views(augment, copies, max_batch, given)
        stops = StopSchedule.once(iterations) if schedule is None else bound(schedule, iterations)
        self.schedule: Schedule = stops
        self.final_mask = one_of("final_mask", final_mask, FINAL_MASKS)
        counts = promised(self.schedule, sparse.num_patches)
        self._check_schedule(max(counts, default=0), iterations)
        self.settings = Settings(
            teacher=sparse,
            objectives=given,
            parametrization=parametrization.bind(space),
            space=space,
            importance=as_importance(importance, sparse),
            iterations=iterations,
            jitter=check_jitter(jitter, iterations, tuple(counts)),
            augment=augment,
            copies=copies,
            max_batch=max_batch,
            finish=check_finish(finish, self.schedule, given, augment, sparse),
            lr=rate_table(lr, iterations, tuple(counts)).to(sparse.device),
            betas=(betas[0], betas[1]),
            weight_decay=weight_decay_of(optimizer, weight_decay),
            freeze_background=one_of("background", background, BACKGROUNDS) == "frozen",
            backend=backend,
            graph=graph and finish is None and graphs_allowed(),
        )
        self._sizes = sizes_of(self.schedule, sparse.image_size, sparse.patch_size)
        check_sizes(self.settings, self._sizes)
        check_ragged(self.settings, self.schedule)
        self._graphs = Graphs(self.settings)
        self._counts = counts

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse a change that would come too late to have an effect."""
        if "_counts" in vars(self):
            raise AttributeError(f"a SparseInverter can't be changed ({name}): make another one")
        super().__setattr__(name, value)

    @property
    def teacher(self) -> SparseViT:
        """The wrapped teacher."""
        return self.settings.teacher

    @property
    def _remaining(self) -> float | None:
        """The share of patches that a re-ranked mask shows; None for those that were kept."""
        if self.final_mask == "kept":
            return None
        return float(getattr(self.schedule, "remaining"))  # noqa: B009

    def _check_schedule(self, last: int, iterations: int) -> None:
        if last >= iterations:
            raise ValueError(
                f"the stop at {last} is past the end of {iterations} iterations: "
                "run more of them, or take StopSchedule.scaled(iterations)"
            )
        if self.final_mask == "reranked" and not hasattr(self.schedule, "remaining"):
            raise ValueError(
                "final_mask='reranked' needs a schedule that says which share of the patches is "
                f"remaining, {type(self.schedule).__name__} doesn't"
            )

    def invert(
        self,
        targets: Tensor | Sequence[int] | None = None,
        *,
        batch: int | None = None,
        init: Tensor | None = None,
        jitter: Jitter | tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> InversionResult:
        """Invert one batch. Ctrl-C ends it early and gives back what is done.

        Args:
            targets: what the objectives read, a row for each image: class indices [B] or
                probabilities [B, classes] for :class:`CrossEntropy`; None where none reads them.
            batch: B, the number of images, where there are no targets.
            init: first images [B, 3, H, W] in normalised space, (pixels - mean) / std, of the
                schedule's first size; by default the parametrization's own, of ``Pixels`` standard
                normal noise. Pixels in [0, 1] are taken as they are too, because they may be meant.
            jitter: in place of the inverter's: a :class:`Jitter`; or shift int64 [T, 2] in pixels
                and flip bool [T] of each iteration, for each image [T, B, 2] and [T, B]. With more
                copies than one, R is the second axis. Around stops there is none, whatever is
                given.
            generator: draws the default ``init``, then ``jitter``, what objectives ask for, the
                seed of ``augment``, and what a schedule draws at its stops, on the CPU; by default
                torch's own.
            progress: show a progress bar, or a line per stop where stderr is no terminal.
            callback: called after each iteration with its number, the images in normalised space
                and the kept patches. Copy them to hold on to them: they are the loop's own. What it
                returns is ignored. It ends the run early by ``raise KeyboardInterrupt``; any other
                exception, StopIteration too, leaves ``invert`` without a result.

        Raises:
            ValueError: targets, batch, init, jitter or generator of the wrong shape, type, range or
                device; no objective depends on the images; or the importance isn't a finite score
                for each kept patch.
            WrongSelection: the schedule answers something else than it promised.
            NonFiniteLoss: an objective or the gradient is infinite or not a number.
        """
        with torch.inference_mode(False), torch.enable_grad():
            return self._invert(targets, batch, init, jitter, generator, progress, callback)

    def _invert(
        self,
        targets: Tensor | Sequence[int] | None,
        batch: int | None,
        init: Tensor | None,
        jitter: Jitter | tuple[Tensor, Tensor] | None,
        generator: torch.Generator | None,
        progress: bool,
        callback: Callback | None,
    ) -> InversionResult:
        refuse_callback(self.settings.finish, callback)
        state = self.start(targets, init, jitter, generator, batch=batch)
        if self.settings.finish is not None:
            stop = partial(self._stop, generator=generator)
            turnover = Turnover(state, tuple(self._counts), stop, progress)
            return turnover.invert(self._remaining)
        display = Progress(self.settings.iterations, progress)
        loop = Loop(state, frozenset(self._counts), display, callback, self._graphs)
        marks: list[tuple[int, int, float]] = []
        importance, interrupted = None, False
        try:
            for first, end in pairwise((0, *self._counts, self.settings.iterations)):
                if first in self._counts:
                    assert importance is not None
                    self._stop(state, first, importance, generator)
                marks.append((state.kept.shape[1], first, time.perf_counter()))
                importance = loop.run(range(first, end))
                display.end_phase(state)
        except KeyboardInterrupt:
            interrupted = True
        except NonFinite as error:
            result = self._result(state, marks, interrupted=True)
            raise NonFiniteLoss(state.done(), str(error), result) from None
        finally:
            display.close()
        return self._result(state, marks, interrupted)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def start(
        self,
        targets: Tensor | Sequence[int] | None = None,
        init: Tensor | None = None,
        jitter: Jitter | tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        *,
        batch: int | None = None,
    ) -> InversionState:
        """The state before the first iteration, from the same arguments as :meth:`invert`."""
        self.teacher.refresh()
        self._graphs.begin()
        settings = at_size(self.settings, self._sizes[0])
        teacher = settings.teacher
        given, batch = as_targets(targets, batch, teacher)
        check_generator(generator)
        for objective in settings.objectives:
            objective.check_targets(given, teacher)
        parameters = first_parameters(settings.parametrization, init, batch, generator)
        shift, flip = jitter_table(
            settings.jitter if jitter is None else jitter,
            settings.iterations,
            batch,
            settings.copies,
            self.teacher,
            self.schedule,
            generator,
        )
        begin(settings, batch, generator)
        state = InversionState(
            settings=settings,
            targets=given,
            parameters=parameters,
            kept=teacher.every_patch(batch),
            shift=scale_shift(shift, self._sizes, self.teacher.image_size),
            flip=flip,
            generator=None if settings.augment is None else on_device(generator, teacher.device),
        )
        if settings.augment is not None and state.generator is not None:
            check_augmented(settings.augment, state.images(), state.generator)
        return state

    def _stop(
        self,
        state: InversionState,
        iteration: int,
        importance: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        """Ask the schedule, and take its answer when that is what it promised."""
        if not bool(importance.isfinite().all()):
            raise ValueError(
                f"expected finite scores of importance {self.settings.importance!r} before the "
                f"stop at {iteration}, got others"
            )
        teacher, count, size = (
            state.settings.teacher,
            self._counts[iteration],
            self._sizes[iteration],
        )
        stop = Stop(iteration, state.kept, importance, teacher.grid, generator, state.lengths)
        selection = self.schedule.select(stop)
        if size == teacher.image_size:
            ragged = getattr(self.schedule, "ragged", False)
            state.keep(check(selection, stop, count, ragged=ragged))
            return
        larger = at_size(self.settings, size)
        state.enlarge(larger, check(selection, stop, count, larger.teacher.grid).kept)
        begin(larger, len(state.kept), generator)

    @torch.no_grad()
    def _result(
        self, state: InversionState, marks: list[tuple[int, int, float]], interrupted: bool
    ) -> InversionResult:
        if state.settings.teacher.image_size != self.teacher.image_size:
            # Interrupted while images were small.
            state.enlarge(self.settings, self.teacher.every_patch(len(state.kept)))
        ends = [*(mark[1:] for mark in marks[1:]), (state.done(), time.perf_counter())]
        timing = tuple(
            Phase(patches, end - first, stop - start)
            for (patches, first, start), (end, stop) in zip(marks, ends, strict=False)
        )
        ages = torch.full((len(state.kept),), state.done(), device=state.kept.device)
        ending = Ending(state.images(), state.kept, state.lengths, ages)
        return result_of(state, ending, timing, state.done(), self._remaining, interrupted)
