"""Fill a pool: invert the labels that it doesn't hold yet, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import nn

from smi_fast.batch_maker import BatchMaker, explained_memory
from smi_fast.group import Group
from smi_fast.inversion import NonFiniteLoss, SparseInverter
from smi_fast.job_progress import JobProgress, Tally
from smi_fast.judge import check_judge
from smi_fast.plan import agree, batches_left, plan_of
from smi_fast.pool import UNFINISHED, Pool
from smi_fast.pool.pictures import draw_loss
from smi_fast.pool.writer import Writer
from smi_fast.provenance import describe, versions
from smi_fast.recipes import Recipe
from smi_fast.soft_stop import SoftStop
from smi_fast.workers import GroupWorker, Worker

# What each image says of the inverter's options; all of them are in the settings of the pool.
PROVENANCE = ("teacher_sha256", "schedule", "parametrization", "precision", "backend")


class Interrupted(Exception):
    """Ctrl-C ended a pool early; the message says where it stands, and where its images are."""


class Stopped(Interrupted):
    """The first Ctrl-C ended it after a batch, which the pool has."""


def rehearse(inverter: SparseInverter, recipe: Recipe) -> None:
    """Evaluate the loss of one image, so that a wrong option shows before a pool is changed.

    Raises:
        ValueError: an objective can't be computed for this teacher.
        BackendUnavailable: the backend can't run here.
        BatchTooLarge: not even one image fits into memory.
    """
    with explained_memory(1):
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
    processes. A thread writes each batch while the next one is inverted. The first Ctrl-C lets the
    batch at work be the last one, the second ends it.

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
        progress: show the progress of the pool and of each batch.
        group: the processes that call this function with the same arguments, and share the batches.

    Raises:
        Stopped: Ctrl-C ended the pool after a batch. Only process 0 of a group raises it.
        Interrupted: Ctrl-C ended a batch; its images so far are in the pool's ``unfinished/``.
        NonFiniteLoss: an objective or the gradient became infinite or NaN; the last finite images
            of the batch are in ``unfinished/``.
        BatchTooLarge: a batch doesn't fit into memory.
        TypeError: the pool is a folder or a URL.
        ValueError: a label that is no class of the pool, a judge of other classes, or more moments
            than iterations.
        PoolError: the pool can't be written, or holds images of other labels; or the processes of a
            group would make different images.
        GroupError: the processes of a group have lost each other.
    """
    if not isinstance(pool, Pool):
        raise TypeError(
            "expected a pool of Pool.create or Pool.resume, at a URL of RemotePool.create or "
            f"RemotePool.resume, got {type(pool).__name__}"
        )
    options = describe(inverter)
    common = {"seed": seed, **{key: options[key] for key in PROVENANCE}, "versions": versions()}
    common |= provenance or {}
    maker = BatchMaker(
        inverter,
        recipe,
        seed=seed,
        judge=judge,
        strip=strip,
        common=common,
        progress=progress,
    )
    first = group is None or group.rank == 0
    if first:
        _check_labels(pool, labels)
        draw_loss(pool)  # a killed run may not have come to it
    plan = plan_of(pool, labels) if first else None
    if group is not None:
        decisive = {**options, **common, "labels": list(labels), "batch_size": batch_size}
        plan = agree(group, plan, decisive)
    assert plan is not None
    if judge is not None:
        check_judge(judge, pool.settings["class_names"])
    batches = batches_left(labels, plan, inverter.schedule, batch_size)
    last = max([number for number, _ in batches] + list(plan.ahead), default=-1)
    held = Tally.of([*pool.records, *pool.waiting]) if first else Tally()
    with SoftStop() as stop, JobProgress(len(labels), held, progress and first) as shown:
        worker = Worker(pool, plan, last, stop, shown)
        if group is not None:
            worker = GroupWorker(pool, plan, last, stop, shown, group)
        with closing(worker), Writer() as writer:
            for turn in worker.turns(len(batches)):
                number, batch = batches[turn]
                start = batch[0].start
                try:
                    result, moments = maker.invert(batch)
                except NonFiniteLoss as error:
                    writer.wait()
                    worker.add_unfinished(error.result.images, start)
                    raise
                if result.interrupted:
                    writer.wait()
                    worker.add_unfinished(result.images, start)
                    raise Interrupted(
                        f"interrupted after {result.iterations} iterations: the unfinished images "
                        f"of this batch are in {pool.where}/{UNFINISHED}; --resume starts the "
                        "batch again"
                    )
                made = maker.made(batch, result, moments)
                writer.write(partial(worker.add, made, number, start))
        worker.finish()
    if not first or len(pool.records) == len(labels):
        return
    if stop.wanted or (group is not None and group.stopped):
        raise Stopped(
            f"stopped: {pool.where} has {len(pool.records)} of {len(labels)} images; --resume "
            "makes the rest"
        )
    # A process of the group has died, and this one makes its batches.
    fill(
        pool,
        inverter,
        labels,
        recipe=recipe,
        batch_size=batch_size,
        seed=seed,
        judge=judge,
        strip=strip,
        provenance=provenance,
        progress=progress,
    )


def _check_labels(pool: Pool, labels: Sequence[int]) -> None:
    classes = len(pool.settings["class_names"])
    for label in labels:
        if not 0 <= label < classes:
            raise ValueError(f"expected labels in 0..{classes - 1}, got {label}")
