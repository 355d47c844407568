"""A batch whose images leave it when they are finished, and whose places others take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from smi_fast.augmentations import Augment, name_of
from smi_fast.early_finish import EarlyFinish
from smi_fast.inversion.ending import Ending, result_of
from smi_fast.inversion.groups import joined, subset
from smi_fast.inversion.loop import Callback, Loop, NonFinite
from smi_fast.inversion.progress import ImagesProgress, Progress
from smi_fast.inversion.result import InversionResult, NonFiniteLoss, Phase
from smi_fast.inversion.sparse_images import confidence
from smi_fast.inversion.state import InversionState
from smi_fast.objectives import Objective
from smi_fast.ops.grid import widened
from smi_fast.schedules import Schedule, images_of_a_trajectory
from smi_fast.teacher import SparseViT

# New images begin together when this share of the places is free. They take the iterations in
# front of the last stop alone, and more of them share what an iteration costs for any batch.
FREE = 0.5

# Takes a stop: (state, iteration, importance).
TakeStop = Callable[[InversionState, int, Tensor], None]


def check_finish(
    finish: EarlyFinish | None,
    schedule: Schedule,
    objectives: tuple[Objective, ...],
    augment: Augment | None,
    teacher: SparseViT,
) -> EarlyFinish | None:
    """Refuse what can't be run with images that are at different iterations.

    Raises:
        TypeError: it is no :class:`EarlyFinish`.
        ValueError: a schedule that takes images out at its stops or lets them grow, objectives that
            couple images or aren't evaluated in each iteration, an augmentation, or a teacher
            without a head.
    """
    if finish is None:
        return None
    if not isinstance(finish, EarlyFinish):
        raise TypeError(f"expected finish as EarlyFinish(0.9), or None, got {finish!r}")
    refused = []
    if images_of_a_trajectory(schedule) > 1 or hasattr(schedule, "image_sizes"):
        refused.append(type(schedule).__name__)
    refused += [
        each.name
        for each in objectives
        if not each.separable or each.every > 1 or each.reads_iteration
    ]
    if augment is not None:
        refused.append(f"augment {name_of(augment)}")
    if not teacher.num_classes:
        refused.append("a teacher without a head")
    if refused:
        raise ValueError(
            "expected classes, and what treats each image alone and all iterations alike, with "
            f"finish, got {', '.join(refused)}"
        )
    return finish


def refuse_callback(finish: EarlyFinish | None, callback: Callback | None) -> None:
    """Refuse a callback, which is called with the number of an iteration.

    Raises:
        ValueError: there is one together with ``finish``.
    """
    if finish is not None and callback is not None:
        raise ValueError(
            "expected no callback with finish, which lets images be at different iterations"
        )


class Turnover:
    """Runs a batch of which only some images are at work at once.

    Images that begin take the iterations in front of the last stop alone. Then they join those at
    work, of which each is at an iteration of its own.

    Args:
        whole: the state of all images before the first iteration.
        stops: iterations of the stops, ascending.
        take_stop: takes one.
        shown: whether to show the progress.

    Raises:
        ValueError: the targets are neither classes nor probabilities.
    """

    def __init__(
        self,
        whole: InversionState,
        stops: tuple[int, ...],
        take_stop: TakeStop,
        shown: bool,
    ) -> None:
        settings, batch = whole.settings, len(whole.kept)
        # It refuses targets that have no probability.
        confidence(whole.parameters.new_zeros(batch, settings.teacher.output_width), whole.targets)
        assert settings.finish is not None
        self._whole, self._finish = whole, settings.finish
        self._stops, self._take_stop = stops, take_stop
        self._iterations = settings.iterations
        self._places = min(batch, settings.max_batch or batch)
        self._waiting = list(range(batch))
        self._young: InversionState | None = None
        self._work: InversionState | None = None
        # In how many of the last iterations the teacher was sure of each image at work.
        self._sure = torch.zeros(0, dtype=torch.int64, device=whole.kept.device)
        self._images = whole.images().clone()
        self._kept = [*whole.kept]
        self._ages = [0] * batch
        self._patches: dict[int, int] = {}
        self._passes: defaultdict[int, int] = defaultdict(int)
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._mark = 0.0
        self._progress = ImagesProgress(batch, shown)

    def invert(self, remaining: float | None) -> InversionResult:
        """Run the batch until all images are finished. Ctrl-C ends it early.

        Args:
            remaining: as of :func:`smi_fast.inversion.ending.result_of`.

        Raises:
            NonFiniteLoss: an objective or the gradient is infinite or not a number.
        """
        interrupted, self._mark = False, time.perf_counter()
        try:
            while self._waiting or self._work is not None:
                if self._waiting and self._free >= self._enough:
                    self._admit()
                self._iterate()
        except KeyboardInterrupt:
            interrupted = True
        except NonFinite as error:
            result = self._result(remaining, interrupted=True)
            raise NonFiniteLoss(result.iterations, str(error), result) from None
        finally:
            self._progress.close()
        return self._result(remaining, interrupted)

    @property
    def _free(self) -> int:
        return self._places - (0 if self._work is None else len(self._work.kept))

    @property
    def _enough(self) -> int:
        """How many places have to be free for new images to begin."""
        return min(len(self._waiting), max(1, round(FREE * self._places)))

    def _admit(self) -> None:
        """Let waiting images take the free places, behind the last stop."""
        index, self._waiting = self._waiting[: self._free], self._waiting[self._free :]
        self._young = young = subset(self._whole, index)
        loop = Loop(young, frozenset(self._stops), Progress(self._iterations, shown=False), None)
        for first, end in pairwise((0, *self._stops)):
            importance = loop.run(range(first, end))
            assert importance is not None
            self._count(young, first, end - first)
            self._take_stop(young, end, importance)
        self._work = young if self._work is None else joined(self._work, young)
        self._sure = torch.cat([self._sure, self._sure.new_zeros(len(index))])
        self._young = None

    def _iterate(self) -> None:
        """Take one iteration of the images at work, and let the finished ones leave."""
        state = self._work
        assert state is not None
        found = state.evaluate()
        last = int(state.iteration[-1])
        name = state.non_finite(slice(last, last + 1))
        if name is not None:
            raise NonFinite(name)
        state.update(found.parameters)
        assert found.confidence is not None
        sure = found.confidence >= self._finish.confidence
        self._sure = torch.where(sure, self._sure + 1, 0)
        ages = _ages(state)
        done = [
            in_a_row >= self._finish.iterations or age == self._iterations
            for in_a_row, age in zip(self._sure.tolist(), ages, strict=True)
        ]
        if any(done):
            self._hold(subset(state, [image for image, out in enumerate(done) if out]))
            stay = [image for image, out in enumerate(done) if not out]
            self._sure = self._sure[stay]
            self._work = subset(state, stay) if stay else None
            self._progress.show(len(done) - len(stay))
        self._count(state, self._stops[-1] if self._stops else 0, 1)

    def _count(self, state: InversionState, phase: int, passes: int) -> None:
        """Add passes to those of a phase, and to its seconds the time since the last call."""
        self._patches[phase] = max(self._patches.get(phase, 0), state.kept.shape[1])
        self._passes[phase] += passes
        now = time.perf_counter()
        self._seconds[phase] += now - self._mark
        self._mark = now

    def _hold(self, state: InversionState) -> None:
        """Hold on to the images of a state, as they are."""
        assert state.rows is not None
        rows = state.rows.tolist()
        self._images[rows] = state.images()
        lengths = state.lengths.tolist() if state.lengths is not None else [None] * len(rows)
        for row, kept, length, age in zip(rows, state.kept, lengths, _ages(state), strict=True):
            self._kept[row], self._ages[row] = kept[:length], age

    def _result(self, remaining: float | None, interrupted: bool) -> InversionResult:
        """The result of all images; those that aren't finished are as they are now."""
        for state in (self._young, self._work):
            if state is not None:
                self._hold(state)
        timing = tuple(
            Phase(patches, self._passes[phase], self._seconds[phase])
            for phase, patches in sorted(self._patches.items())
        )
        ages = torch.tensor(self._ages, dtype=torch.int64, device=self._whole.kept.device)
        ending = Ending(self._images, *self._kept_together(), ages)
        most = max(self._ages, default=0)
        return result_of(self._whole, ending, timing, most, remaining, interrupted)

    def _kept_together(self) -> tuple[Tensor, Tensor | None]:
        """The kept patches int64 [B, K], and how many count in each image where that differs."""
        counts = [len(each) for each in self._kept]
        if not counts:
            return self._whole.kept, None
        patches = self._whole.settings.teacher.num_patches
        kept = torch.cat([widened(each[None], max(counts), patches) for each in self._kept])
        alike = min(counts) == max(counts)
        return kept, None if alike else torch.tensor(counts, device=kept.device)


def _ages(state: InversionState) -> list[int]:
    """Iterations that each image of a state received."""
    done = state.iteration.tolist()
    return [age for age, count in zip(done, state.groups, strict=True) for _ in range(count)]
