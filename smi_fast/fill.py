"""Fill a pool: invert the labels that it doesn't hold yet, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smi_fast.inversion import InversionResult, NonFiniteLoss, SparseInverter
from smi_fast.judge import check_judge, verdicts
from smi_fast.pool import METADATA, UNFINISHED, Pool, PoolError
from smi_fast.pool.pictures import draw_loss
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
) -> None:
    """Invert the labels that the pool doesn't hold yet.

    The settings, the seed and the index of a batch's first image decide its images. So an
    interrupted and resumed run makes the same pool as one without interruption.

    Args:
        pool: the pool; image ``i`` has the label ``labels[i]``.
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

    Raises:
        Interrupted: Ctrl-C ended a batch; its images so far are in the pool's ``unfinished/``.
        NonFiniteLoss: an objective or the gradient became infinite or NaN; the last finite images
            of the batch are in ``unfinished/``.
        BatchTooLarge: a batch doesn't fit into memory.
        ValueError: a label that is no class of the pool, a judge of other classes, or more moments
            than iterations.
        PoolError: the pool can't be written, or holds images of other labels.
    """
    classes = len(pool.settings["class_names"])
    for label in labels:
        if not 0 <= label < classes:
            raise ValueError(f"expected labels in 0..{classes - 1}, got {label}")
    check_strip(strip, inverter.settings.iterations)
    if judge is not None:
        check_judge(judge, pool.settings["class_names"])
    held = _check_held(pool, labels)
    options = describe(inverter)
    same = {"seed": seed, **{key: options[key] for key in PROVENANCE}, "versions": versions()}
    same |= provenance or {}
    draw_loss(pool)  # a killed run may not have come to it
    for batch in _batches(labels, held, inverter, batch_size):
        start, wanted = batch[0].start, [trajectory.label for trajectory in batch]
        generator = torch.Generator().manual_seed(batch_seed(seed, start))
        moments = _Moments(inverter, strip)
        watch: dict[str, Any] = {"callback": moments} if strip else {}
        try:
            with _explained_memory(len(wanted)):
                targets = recipe.targets(
                    torch.tensor(wanted), inverter.teacher.num_classes, generator
                )
                targets = targets.to(inverter.teacher.device)
                result = inverter.invert(targets, generator=generator, progress=progress, **watch)
        except NonFiniteLoss as error:
            pool.add_unfinished(error.result.images)
            raise
        if result.interrupted:
            pool.add_unfinished(result.images)
            raise Interrupted(
                f"interrupted after {result.iterations} iterations: the unfinished images of this "
                f"batch are in {pool.path / UNFINISHED}; --resume starts the batch again"
            )
        made = _made(result, batch, inverter)
        seen = [{}] * len(made.records) if judge is None else verdicts(judge, made.images)
        records = [
            {**record, **word, **same} for record, word in zip(made.records, seen, strict=True)
        ]
        loss = {"stops": list(inverter.schedule.at), "history": result.history}
        pool.add(
            made.images,
            made.masks,
            records,
            loss=loss,
            seconds=result.seconds,
            moments=[moment[made.rows] for moment in moments.seen],
        )
        draw_loss(pool)


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


def _check_held(pool: Pool, labels: Sequence[int]) -> int:
    """The number of images in the pool, which must be of the first labels, with the entries of
    :func:`_made`.
    """
    records = pool.records
    if len(records) > len(labels):
        raise PoolError(
            f"expected {pool.path} to hold {len(labels)} images or fewer, got {len(records)}"
        )
    for index, (record, label) in enumerate(zip(records, labels, strict=False)):
        confidence = record.get("confidence")
        if (
            record["label"] != label
            or not (isinstance(confidence, float) and 0 <= confidence <= 1)
            or not all(isinstance(record.get(key), int) for key in ("prediction", "iterations"))
            or not isinstance(record.get("kept"), list)
        ):
            raise PoolError(
                f"line {index + 1} of {pool.path / METADATA} is not the record of an image of "
                f"class {label}"
            )
    return len(records)


class _Trajectory(NamedTuple):
    """A trajectory of a pool.

    Attributes:
        number: in the pool.
        start: index of its first image.
        label: class of its images.
        images: how many of its images the pool takes.
    """

    number: int
    start: int
    label: int
    images: int


def _batches(
    labels: Sequence[int], held: int, inverter: SparseInverter, size: int
) -> list[list[_Trajectory]]:
    """The batches that are left of a pool that holds some images.

    Raises:
        PoolError: the pool ends amid a trajectory.
    """
    most = images_of_a_trajectory(inverter.schedule)
    found: list[_Trajectory] = []
    for start, label in enumerate(labels):
        last = found[-1] if found else None
        if last is not None and last.label == label and last.images < most:
            found[-1] = last._replace(images=last.images + 1)
        else:
            found.append(_Trajectory(len(found), start, label, 1))
    left = [trajectory for trajectory in found if trajectory.start >= held]
    if (left[0].start if left else len(labels)) != held:
        raise PoolError(
            f"expected whole trajectories of {most} images in the pool, got {held} images: make it "
            "anew"
        )
    return [left[first : first + size] for first in range(0, len(left), size)]


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


def _made(result: InversionResult, batch: Sequence[_Trajectory], inverter: SparseInverter) -> _Made:
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
