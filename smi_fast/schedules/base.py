"""The contract of a schedule: when patches stop, and which ones."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smi_fast.ops.grid import first, patch_mask


@dataclass(frozen=True, eq=False)
class Stop:
    """What a schedule knows at a stop.

    Attributes:
        iteration: from 0; the stop is taken before this iteration.
        kept: int64 [B, K], the patches kept until now, ascending.
        importance: [B, K], score of each of them, from the iteration before, without jitter.
        grid: patches per side, (rows, columns).
        generator: of the run, on the CPU, for a schedule that draws random numbers; None for
            torch's own.
        lengths: int64 [B], of a ragged schedule how many of ``kept`` count in each image, the first
            ones; None where all do.
    """

    iteration: int
    kept: Tensor
    importance: Tensor
    grid: tuple[int, int]
    generator: torch.Generator | None = None
    lengths: Tensor | None = None

    def counts(self) -> Tensor:
        """bool [B, K], which of ``kept`` count."""
        if self.lengths is None:
            return torch.ones_like(self.kept, dtype=torch.bool)
        return first(self.kept, self.lengths)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a schedule answers at a stop.

    Attributes:
        kept: int64 [B, K'], the patches that stay, ascending.
        finished: int64 [B, F], patches that leave as a finished sparse image, ascending; None for
            none. Patches in neither set are dropped.
        lengths: int64 [B], how many of ``kept`` stay in each image, from 1: the first ones. Those
            behind them are padding, other patches of the grid. None where all stay.
    """

    kept: Tensor
    finished: Tensor | None = None
    lengths: Tensor | None = None


class Schedule(Protocol):
    """Decides at which iterations patches stop, and which of them stay.

    The loop asks :meth:`select` once at each stop and checks the answer with :func:`check`. A
    schedule whose stops depend on the length of the run has a method ``bind(iterations)`` too: it
    returns the schedule of that run, which the loop takes in its place. One whose patches leave as
    finished images has ``images``, the number of sparse images that a trajectory gives. One whose
    images grow has ``image_sizes(image_size)``: the (height, width) of each phase between stops, of
    which the last is the teacher's. Where a stop changes the size, ``Selection.kept`` is of the
    larger grid. One that keeps another number of patches in each image has ``ragged``, true, and
    answers with ``lengths``; its counts are then the most that may stay.

    >>> class Half:
    ...     at = (5,)
    ...     def counts(self, patches):
    ...         return (patches // 2,)
    ...     def select(self, stop):
    ...         best = stop.importance.topk(stop.kept.shape[1] // 2, dim=1).indices
    ...         return Selection(stop.kept.gather(1, best).sort(dim=1).values)
    >>> invert(teacher, [7], schedule=Half(), iterations=10, progress=False).kept.shape
    torch.Size([1, 32])
    """

    @property
    def at(self) -> tuple[int, ...]:
        """Iterations of the stops, ascending from 1."""

    def counts(self, patches: int) -> tuple[int, ...]:
        """How many patches stay after each stop, of an image that has ``patches``.

        Raises:
            ValueError: a stop would leave no patch.
        """

    def select(self, stop: Stop) -> Selection:
        """Which patches stay after a stop: as many as :meth:`counts` promises."""


def check_stops(at: Iterable[int]) -> tuple[int, ...]:
    """The iterations of stops as a tuple.

    Raises:
        ValueError: they aren't whole numbers that ascend from 1.
    """
    try:
        stops = tuple(map(operator.index, at))
    except TypeError:
        raise ValueError(f"expected stops as whole numbers, (50, 100), got {at!r}") from None
    if not ascend(stops):
        raise ValueError(f"expected stops that ascend from 1 or later, got {stops}")
    return stops


def ascend(stops: Sequence[int]) -> bool:
    """Whether the iterations of stops ascend from 1 or later."""
    return list(stops) == sorted(set(stops)) and min(stops, default=1) >= 1


def bound(schedule: Schedule, iterations: int) -> Schedule:
    """The schedule of a run of T iterations: what its ``bind`` returns, where it has one.

    >>> bound(StopSchedule((5,), (0.5,)), 100).at, bound(PatchRebirth(v=2), 100).at
    ((5,), (50,))

    Raises:
        ValueError: there is no such schedule for so few iterations.
    """
    if isinstance(schedule, type) or not hasattr(schedule, "bind"):
        return schedule
    of_run: Schedule = schedule.bind(iterations)
    return of_run


def images_of_a_trajectory(schedule: Schedule) -> int:
    """How many sparse images a trajectory gives: ``images`` of the schedule, where it has them.

    >>> images_of_a_trajectory(Dense()), images_of_a_trajectory(PatchRebirth(v=4))
    (1, 4)
    """
    return int(getattr(schedule, "images", 1))


def promised(schedule: Schedule, patches: int) -> dict[int, int]:
    """How many of ``patches`` a schedule promises to keep after each of its stops.

    Raises:
        TypeError: it is no schedule; the message names what it lacks.
        ValueError: stops that don't ascend from 1, or not one count from 1 for each stop.
    """
    lacks = [name for name in ("at", "counts", "select") if not hasattr(schedule, name)]
    if lacks or isinstance(schedule, type):
        got = f"the class {schedule.__name__}" if isinstance(schedule, type) else repr(schedule)
        raise TypeError(
            "expected a schedule, which has at, counts(patches) and select(stop), "
            f"got {got}{', without ' if lacks else ''}{' and '.join(lacks)}"
        )
    at, counts = check_stops(schedule.at), tuple(schedule.counts(patches))
    if len(counts) != len(at) or any(count < 1 for count in counts):
        raise ValueError(
            f"expected one count from 1 for each of {len(at)} stops from "
            f"{type(schedule).__name__}.counts, got {counts}"
        )
    return dict(zip(at, counts, strict=True))


def sizes_of(
    schedule: Schedule, image_size: tuple[int, int], patch_size: int
) -> dict[int, tuple[int, int]]:
    """The (height, width) of images by the iteration from which they have it, first 0.

    Args:
        schedule: has stops that :func:`promised` has checked.
        image_size: (height, width) of the teacher.
        patch_size: side of a patch, in pixels.

    Raises:
        ValueError: not one size for each phase, the teacher's not the last, or one that isn't whole
            patches.
    """
    first = (0, *schedule.at)
    if not hasattr(schedule, "image_sizes"):
        return dict.fromkeys(first, image_size)
    sizes = tuple(map(tuple, schedule.image_sizes(image_size)))
    if len(sizes) != len(first) or sizes[-1] != image_size:
        raise ValueError(
            f"expected image sizes for {len(first)} phases, the teacher's {image_size} last, "
            f"got {', '.join(map(_size, sizes))}"
        )
    for size in sizes:
        if any(side < patch_size or side % patch_size for side in size):
            raise ValueError(
                f"expected image sizes that patches of {patch_size} pixels divide, "
                f"got {_size(size)}"
            )
    return {at: (int(height), int(width)) for at, (height, width) in zip(first, sizes, strict=True)}


def _size(size: Iterable[float]) -> str:
    return " x ".join(f"{side:g}" for side in size)


class WrongSelection(ValueError):
    """A schedule answered something else than it promised."""


def check(
    selection: Selection,
    stop: Stop,
    count: int,
    grid: tuple[int, int] | None = None,
    *,
    ragged: bool = True,
) -> Selection:
    """The selection, when it is a valid answer at a stop.

    Args:
        selection: the schedule's answer.
        stop: what it was asked.
        count: how many patches it promised to keep.
        grid: (rows, columns) after a stop at which images grow; None where they don't.
        ragged: whether the schedule said that it may answer with lengths.

    Raises:
        WrongSelection: another count; patches that weren't kept, repeat, or don't ascend; or a
            patch that both stays and leaves.
    """
    if not isinstance(selection, Selection):
        raise WrongSelection(
            f"expected a Selection from the schedule at {stop.iteration}, "
            f"got {type(selection).__name__}"
        )
    if grid is not None and selection.finished is not None:
        raise WrongSelection(
            f"expected no finished patches where images grow, the schedule at {stop.iteration} "
            "answered some"
        )
    if selection.lengths is not None:
        if not ragged:
            raise WrongSelection(
                "expected lengths from a schedule that has ragged = True only, the one at "
                f"{stop.iteration} hasn't"
            )
        if selection.finished is not None or grid is not None:
            raise WrongSelection(
                f"expected lengths alone, the schedule at {stop.iteration} answered finished "
                "patches or other image sizes too"
            )
        _check_ragged(selection.kept, selection.lengths, stop, count)
        return selection
    _check_set("kept", selection.kept, stop, count, grid)
    if selection.finished is not None:
        _check_set("finished", selection.finished, stop, None)
        together = torch.cat([selection.kept, selection.finished], dim=1).sort(dim=1).values
        if bool((together.diff(dim=1) == 0).any()):
            raise WrongSelection(
                f"expected finished patches that don't stay, the schedule at {stop.iteration} "
                "answered some that do"
            )
    return selection


def _check_set(
    name: str,
    patches: Tensor,
    stop: Stop,
    count: int | None,
    grown: tuple[int, int] | None = None,
) -> None:
    at, batch = stop.iteration, len(stop.kept)
    if not isinstance(patches, Tensor):
        raise WrongSelection(
            f"expected {name} as a tensor from the schedule at {at}, got {type(patches).__name__}"
        )
    fits = patches.dim() == 2 and len(patches) == batch and patches.dtype == torch.int64
    if not fits or (count is not None and patches.shape[1] != count):
        size = "F" if count is None else count
        raise WrongSelection(
            f"expected {name} int64 [{batch}, {size}] from the schedule at {at}, "
            f"got {patches.dtype} {list(patches.shape)}"
        )
    if patches.device != stop.kept.device:
        raise WrongSelection(
            f"expected {name} on {stop.kept.device} from the schedule at {at}, got {patches.device}"
        )
    if bool((patches.diff(dim=1) <= 0).any()):
        raise WrongSelection(
            f"expected {name} distinct and ascending from the schedule at {at}, "
            f"got {patches.tolist()}"
        )
    if grown is not None:
        _check_range(name, patches, at, grown)
        return
    total = stop.grid[0] * stop.grid[1]
    # Out of range patches would index past the mask, so they count as the patch after the last.
    inside = torch.where((patches >= 0) & (patches < total), patches, total)
    was_kept = torch.zeros(batch, total + 1, dtype=torch.bool, device=patches.device)
    was_kept.scatter_(1, stop.kept, True)
    if not bool(was_kept.gather(1, inside).all()):
        raise WrongSelection(
            f"expected {name} among the patches kept so far from the schedule at {at}, "
            f"got {patches.tolist()}"
        )


def _check_ragged(kept: Tensor, lengths: Tensor, stop: Stop, most: int) -> None:
    at, batch = stop.iteration, len(stop.kept)
    patches, width = kept, most
    if isinstance(kept, Tensor) and kept.dim() == 2:
        patches, width = kept.sort(dim=1).values, min(kept.shape[1], most)
    _check_set("kept", patches, stop, width, stop.grid)
    fits = isinstance(lengths, Tensor) and lengths.shape == (batch,)
    if not fits or lengths.dtype != torch.int64 or lengths.device != kept.device:
        got = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, Tensor) else lengths
        raise WrongSelection(
            f"expected lengths int64 [{batch}] on {kept.device} from the schedule at {at}, "
            f"got {got}"
        )
    if bool(((lengths < 1) | (lengths > kept.shape[1])).any()):
        raise WrongSelection(
            f"expected lengths in 1..{kept.shape[1]} from the schedule at {at}, "
            f"got {lengths.tolist()}"
        )
    stays = first(kept, lengths)
    was_kept = patch_mask(stop.kept, *stop.grid, stop.lengths).flatten(1)
    ascends = (kept.diff(dim=1) > 0) | ~stays[:, 1:]
    if not bool(((was_kept.gather(1, kept) | ~stays).all(dim=1) & ascends.all(dim=1)).all()):
        raise WrongSelection(
            "expected patches that stay to ascend, among those kept so far, from the schedule at "
            f"{at}, got the first {lengths.tolist()} of {kept.tolist()}"
        )


def _check_range(name: str, patches: Tensor, at: int, grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1]
    if bool(((patches < 0) | (patches >= total)).any()):
        raise WrongSelection(
            f"expected {name} in 0..{total - 1} of the larger grid from the schedule at {at}, "
            f"got {patches.tolist()}"
        )


def still_iterations(schedule: Schedule) -> frozenset[int]:
    """Iterations without jitter: each stop, and the one before, which scores importance."""
    return frozenset(t - before for t in schedule.at for before in (0, 1))
