"""How a process takes its share of a pool's batches: all of them, or as one of a group."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from torch import Tensor

from smi_fast.batch_maker import MadeBatch
from smi_fast.group import Group
from smi_fast.job_progress import JobProgress, Tally
from smi_fast.plan import Plan
from smi_fast.pool import Pool
from smi_fast.pool.parts import Part
from smi_fast.pool.pictures import draw_loss
from smi_fast.soft_stop import SoftStop

_SECONDS_BETWEEN_LOOKS = 0.2
# A plot takes a tenth of a second, in which Python computes nothing else, as long as a small batch.
_SECONDS_BETWEEN_PLOTS = 10.0


class Worker:
    """Makes all batches, and adds them to the pool.

    Args:
        pool: of :meth:`Pool.create` or :meth:`Pool.resume`.
        plan: where the pool stands.
        last: number of the pool's last batch, whose loss the pool shows.
        stop: is asked before each batch.
        progress: shows what is added.
    """

    def __init__(
        self, pool: Pool, plan: Plan, last: int, stop: SoftStop, progress: JobProgress
    ) -> None:
        self._pool, self._last_is_held, self._last = pool, last in plan.ahead, last
        self._stop, self._progress = stop, progress
        self._made = Tally()
        self._drawn = -math.inf

    def turns(self, count: int) -> Iterator[int]:
        """The batches that this process makes, among those that are left."""
        for turn in range(count):
            if self._stop.wanted:
                return
            yield turn

    def add(self, made: MadeBatch, number: int, start: int) -> None:
        """Add a batch, given its number in the pool and the index of its first image.

        Raises:
            PoolError: it can't be written.
        """
        self._pool.add(
            made.images,
            made.masks,
            made.records,
            loss=None if self._last_is_held else made.loss,
            seconds=made.seconds,
            moments=made.moments,
        )
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_PLOTS:
            self._draw()
        self._count(made)
        self._progress.show(self._made)

    def add_unfinished(self, images: Tensor, start: int) -> None:
        """Save the images of an interrupted batch, given the index of the first one.

        Raises:
            PoolError: they can't be written.
        """
        self._pool.add_unfinished(images)
        self._draw()

    def close(self) -> None:
        """Let other processes open what this one has added to."""

    def finish(self) -> None:
        """Complete the pool after the last batch."""
        self._draw()

    def _draw(self) -> None:
        draw_loss(self._pool)
        self._drawn = time.monotonic()

    def _count(self, made: MadeBatch) -> None:
        self._made += Tally.of(made.records)


class GroupWorker(Worker):
    """Makes the batches whose turn the group gives it, and adds them to its part of the pool.

    Args:
        pool: see :class:`Worker`; of a process other than 0, opened by ``Pool(path)``.
        plan: see :class:`Worker`, as the next three.
        last: likewise.
        stop: likewise.
        progress: likewise; of process 0, which shows what all of them add.
        group: the processes.
    """

    def __init__(
        self,
        pool: Pool,
        plan: Plan,
        last: int,
        stop: SoftStop,
        progress: JobProgress,
        group: Group,
    ) -> None:
        super().__init__(pool, plan, last, stop, progress)
        self._group = group
        self._part: Part | None = None

    def turns(self, count: int) -> Iterator[int]:
        self._group.begin()
        while not self._stops() and (turn := self._group.next()) < count:
            if self._part is None:
                self._part = self._pool.part(self._group.rank)
                self._group.hold()
            yield turn

    def _stops(self) -> bool:
        if self._stop.wanted:
            self._group.stop()
        return self._group.stopped

    def add(self, made: MadeBatch, number: int, start: int) -> None:
        assert self._part is not None
        self._part.add(
            made.images,
            made.masks,
            made.records,
            batch=number,
            start=start,
            loss=made.loss if number == self._last else None,
            seconds=made.seconds,
            moments=made.moments,
        )
        self._count(made)
        self._group.report(self._made.to_json())
        self._show()

    def add_unfinished(self, images: Tensor, start: int) -> None:
        assert self._part is not None
        self._part.add_unfinished(images, start)

    def close(self) -> None:
        if self._part is not None:
            self._part.close()

    def finish(self) -> None:
        """Tell the group that this process is done; process 0 completes the pool after all are.

        A process that was killed holds its part no longer, and is waited for no more.
        """
        self._group.finish()
        if self._group.rank != 0:
            return
        while self._at_work():
            self._show()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self._show()
        self._pool.gather()
        self._draw()

    def _at_work(self) -> bool:
        begun, holding = self._group.at_work()
        return bool(begun) or any(map(self._pool.part_is_held, holding))

    def _show(self) -> None:
        if self._group.rank == 0:
            reports = map(Tally.from_json, self._group.reports())
            self._progress.show(sum(reports, start=Tally()))
