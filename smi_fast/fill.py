"""Fill a pool: invert the labels that it doesn't hold yet, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smi_fast.group import Group
from smi_fast.inversion import InversionResult, NonFiniteLoss, SparseInverter
from smi_fast.judge import check_judge, verdicts
from smi_fast.plan import Trajectory, agree, batches_left, check_complete, plan_of
from smi_fast.pool import UNFINISHED, Pool
from smi_fast.pool.parts import Part
from smi_fast.pool.pictures import draw_loss
from smi_fast.pool.writer import Writer
from smi_fast.provenance import describe, versions
from smi_fast.recipes import Recipe
from smi_fast.schedules import images_of_a_trajectory

# What each image says of the inverter's options; all of them are in the settings of the pool.
PROVENANCE = ("teacher_sha256", "schedule", "parametrization", "precision", "backend")


class Interrupted(Exception):
    """Ctrl-C ended a batch; the message says at which iteration, and where its images are."""


class BatchTooLarge(MemoryError):
    """A batch doesn't fit into memory."""


def batch_seed(seed: int, start: int) -> int:
    """The seed of a batch, for a generator of torch.

    It is ``seed * 2**32 + start`` while the seed has 32 bits, so that no two batches share one.
    Beyond, it is the first 64 bits that numpy's ``SeedSequence([seed, start])`` generates.

    Args:
        seed: of the pool, from 0.
        start: index of the batch's first image.
    """
    if seed < 2**32:
        return (seed << 32) + start
    return int(np.random.SeedSequence([seed, start]).generate_state(1, np.uint64)[0])


def rehearse(inverter: SparseInverter, recipe: Recipe) -> None:
    """Evaluate the loss of one image, so that a wrong option shows before a pool is changed.

    Raises:
        ValueError: an objective can't be computed for this teacher.
        BackendUnavailable: the backend can't run here.
        BatchTooLarge: not even one image fits into memory.
    """
    with _explained_memory(1):
        targets = recipe.targets(torch.tensor([0]), inverter.teacher.num_classes, torch.Generator())
        state = inverter.start(targets.to(inverter.teacher.device), generator=torch.Generator())
        state.evaluate(score=bool(inverter.schedule.at))


def fill(
    pool: Pool,
    inverter: SparseInverter,
    labels: Sequence[int],
    *,
    recipe: Recipe,
    batch_size: int = 40,
    seed: int = 0,
    judge: nn.Module | None = None,
    strip: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> None:
    """Invert the labels that the pool doesn't hold yet.

    The settings, the seed and the index of a batch's first image decide its images. So an
    interrupted and resumed run makes the same pool as one without interruption, and so do several
    processes. A thread writes each batch while the next one is inverted.

    Args:
        pool: the pool; image ``i`` has the label ``labels[i]``. Of a group, only process 0 opens it
            by :meth:`Pool.create` or :meth:`Pool.resume`, the others by ``Pool(path)``.
        inverter: inverts each batch.
        labels: class of each image of the whole pool.
        recipe: turns labels into targets.
        batch_size: number of trajectories in a batch. Each gives one image, unless the schedule
            takes several out of it, as :class:`smi_fast.PatchRebirth` does. These go to images
            with the same label that follow each other; of the last trajectory of a label, its
            first images may do.
        seed: from 0; decides noise, jitter and soft targets, see :func:`batch_seed`.
        judge: what says what it sees in each whole image, see :func:`smi_fast.judge.load_judge`.
        strip: number of moments of each image's inversion that ``report/progress/`` shows, at equal
            distances, the last one finished; 0 for none.
        provenance: further entries of each image's record, beside those of the pool, the teacher's
            prediction and confidence, iterations, seed, the most important options, versions and
            the hash of the weights.
        progress: show the progress of each batch.
        group: the processes that call this function with the same arguments, and share the batches.

    Raises:
        Interrupted: Ctrl-C ended a batch; its images so far are in the pool's ``unfinished/``.
        NonFiniteLoss: an objective or the gradient became infinite or NaN; the last finite images
            of the batch are in ``unfinished/``.
        BatchTooLarge: a batch doesn't fit into memory.
        ValueError: a label that is no class of the pool, a judge of other classes, or more moments
            than iterations.
        PoolError: the pool can't be written, or holds images of other labels; or the processes of a
            group would make different images.
    """
    check_strip(strip, inverter.settings.iterations)
    options = describe(inverter)
    same = {"seed": seed, **{key: options[key] for key in PROVENANCE}, "versions": versions()}
    same |= provenance or {}
    first = group is None or group.rank == 0
    if first:
        _check_labels(pool, labels)
        draw_loss(pool)  # a killed run may not have come to it
    plan = plan_of(pool, labels) if first else None
    if group is not None:
        decisive = {**options, **same, "labels": list(labels), "batch_size": batch_size}
        plan = agree(group, plan, decisive)
    assert plan is not None
    if judge is not None:
        check_judge(judge, pool.settings["class_names"])
    batches = batches_left(labels, plan, inverter.schedule, batch_size)
    last = max([number for number, _ in batches] + list(plan.ahead), default=-1)
    part = None if group is None else Part(pool.path, pool.settings, group.rank)
    with Writer() as writer:
        for turn in _turns(group, len(batches)):
            number, batch = batches[turn]
            start, wanted = batch[0].start, [trajectory.label for trajectory in batch]
            generator = torch.Generator().manual_seed(batch_seed(seed, start))
            moments = _Moments(inverter, strip)
            watch: dict[str, Any] = {"callback": moments} if strip else {}
            unfinished = pool.add_unfinished
            if part is not None:
                unfinished = partial(part.add_unfinished, start=start)
            try:
                with _explained_memory(len(wanted)):
                    targets = recipe.targets(
                        torch.tensor(wanted), inverter.teacher.num_classes, generator
                    )
                    targets = targets.to(inverter.teacher.device)
                    result = inverter.invert(
                        targets, generator=generator, progress=progress, **watch
                    )
            except NonFiniteLoss as error:
                writer.wait()
                unfinished(error.result.images)
                raise
            if result.interrupted:
                writer.wait()
                unfinished(result.images)
                raise Interrupted(
                    f"interrupted after {result.iterations} iterations: the unfinished images of "
                    f"this batch are in {pool.path / UNFINISHED}; --resume starts the batch again"
                )
            made = _made(result, batch, inverter)
            seen = [{}] * len(made.records) if judge is None else verdicts(judge, made.images)
            records = [
                {**record, **word, **same} for record, word in zip(made.records, seen, strict=True)
            ]
            images, masks = made.images.cpu(), made.masks.cpu()
            rest: dict[str, Any] = {
                "seconds": result.seconds,
                "moments": [moment[made.rows] for moment in moments.seen],
            }
            # The pool shows the loss of its last batch, whoever makes it and when.
            if number == last if part else last not in plan.ahead:
                rest["loss"] = {"stops": list(inverter.schedule.at), "history": result.history}
            if part is None:
                add: Callable[..., None] = partial(_add, pool)
            else:
                add = partial(part.add, batch=number, start=start)
            writer.write(partial(add, images, masks, records, **rest))
    if group is not None and part is not None:
        part.close()
        group.finish()
        if first:
            pool.gather()
            check_complete(pool, len(labels))
            draw_loss(pool)


def _add(pool: Pool, *arguments: Any, **options: Any) -> None:
    pool.add(*arguments, **options)
    draw_loss(pool)


def _turns(group: Group | None, count: int) -> Iterator[int]:
    """The turns of this process among ``count``."""
    if group is None:
        yield from range(count)
        return
    while (turn := group.next()) < count:
        yield turn


def _check_labels(pool: Pool, labels: Sequence[int]) -> None:
    classes = len(pool.settings["class_names"])
    for label in labels:
        if not 0 <= label < classes:
            raise ValueError(f"expected labels in 0..{classes - 1}, got {label}")


def check_strip(strip: int, iterations: int) -> None:
    """Refuse a number of moments that a run doesn't have.

    Raises:
        ValueError: it is below 0, or more than the iterations.
    """
    if not 0 <= strip <= iterations:
        raise ValueError(f"expected a strip of 0..{iterations} moments, got {strip}")


class _Moments:
    """Keeps the pixels of a batch at moments of equal distances."""

    def __init__(self, inverter: SparseInverter, count: int) -> None:
        settings = inverter.settings
        self._space = settings.space
        self._wanted = {(i + 1) * settings.iterations // count - 1 for i in range(count)}
        self.seen: list[Tensor] = []

    def __call__(self, number: int, images: Tensor, kept: Tensor) -> None:
        if number in self._wanted:
            self.seen.append(self._space.denormalize(images).detach().cpu())


@contextmanager
def _explained_memory(size: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for a full GPU, but not for a full main memory.
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if full or "allocate memory" in str(error):
            raise BatchTooLarge(
                f"a batch of {size} images does not fit into memory: take a smaller --batch-size"
            ) from error
        raise


class _Made(NamedTuple):
    """The images of a batch that go into the pool.

    Attributes:
        images: [S, 3, H, W] in [0, 1].
        masks: bool [S, rows, columns].
        rows: int64 [S] on the CPU, the trajectory of each image in the batch.
        records: of each image.
    """

    images: Tensor
    masks: Tensor
    rows: Tensor
    records: list[dict[str, Any]]


def _made(result: InversionResult, batch: Sequence[Trajectory], inverter: SparseInverter) -> _Made:
    most = images_of_a_trajectory(inverter.schedule)
    counts = torch.tensor([trajectory.images for trajectory in batch])
    rows = torch.arange(len(batch)).repeat_interleave(counts)
    if most == 1:
        images, masks, ages = result.images, result.masks, [result.iterations] * len(batch)
        logits, confidence = result.logits, result.confidence
    else:
        found = result.sparse_images()
        chosen = torch.cat([most * i + torch.arange(t.images) for i, t in enumerate(batch)])
        chosen = chosen.to(result.images.device)
        images, masks = found.canvases[found.trajectory[chosen]], found.masks[chosen]
        ages = found.age[chosen].tolist()
        logits, confidence = found.logits[chosen], found.confidence[chosen]
    records = [
        {
            "label": batch[row].label,
            "prediction": prediction,
            "confidence": sure,
            "iterations": age,
            **({} if most == 1 else {"trajectory": batch[row].number}),
        }
        for row, prediction, sure, age in zip(
            rows.tolist(), logits.argmax(1).tolist(), confidence.tolist(), ages, strict=True
        )
    ]
    return _Made(images, masks, rows, records)
