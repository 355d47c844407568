"""A batch of a pool: from its labels to images, masks and records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smi_fast.inversion import InversionResult, SparseInverter
from smi_fast.judge import verdicts
from smi_fast.plan import Trajectory
from smi_fast.recipes import Recipe
from smi_fast.schedules import images_of_a_trajectory


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


def check_strip(strip: int, inverter: SparseInverter) -> None:
    """Refuse a number of moments that a run doesn't have.

    Raises:
        ValueError: it is below 0, or more than the iterations; or there are moments of images that
            may be finished early.
    """
    iterations = inverter.settings.iterations
    if not 0 <= strip <= iterations:
        raise ValueError(f"expected a strip of 0..{iterations} moments, got {strip}")
    if strip and inverter.settings.finish is not None:
        raise ValueError(
            f"expected a strip of 0 moments with finish, whose images leave early, got {strip}"
        )


@contextmanager
def explained_memory(size: int) -> Iterator[None]:
    """Say what to do where a batch of ``size`` images doesn't fit into memory.

    Raises:
        BatchTooLarge: it doesn't.
    """
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


class MadeBatch(NamedTuple):
    """A batch as a pool takes it, see :meth:`smi_fast.pool.Pool.add`.

    Attributes:
        images: [S, 3, H, W] in [0, 1] on the CPU.
        masks: bool [S, rows, columns] on the CPU.
        records: of each image.
        seconds: that the batch took.
        moments: the images at some moments of their inversion, each as ``images``.
        loss: the values of each objective, and the stops.
    """

    images: Tensor
    masks: Tensor
    records: list[dict[str, Any]]
    seconds: float
    moments: list[Tensor]
    loss: dict[str, Any]


class BatchMaker:
    """Inverts batches of a pool.

    Args:
        inverter: inverts each batch.
        recipe: turns labels into targets.
        seed: of the pool, see :func:`batch_seed`.
        judge: says what it sees in each whole image; None for no verdict.
        strip: number of moments that are kept of each image's inversion.
        common: entries that the records of all images have.
        progress: show the progress of each batch.

    Raises:
        ValueError: more moments than iterations, or some with ``finish``.
    """

    def __init__(
        self,
        inverter: SparseInverter,
        recipe: Recipe,
        *,
        seed: int,
        judge: nn.Module | None,
        strip: int,
        common: Mapping[str, Any],
        progress: bool,
    ) -> None:
        check_strip(strip, inverter)
        self._inverter, self._recipe, self._seed = inverter, recipe, seed
        self._judge, self._strip, self._common = judge, strip, common
        self._progress = progress

    def invert(self, batch: Sequence[Trajectory]) -> tuple[InversionResult, list[Tensor]]:
        """The result of a batch, and the pixels of all its trajectories at each moment.

        Raises:
            NonFiniteLoss: an objective or the gradient became infinite or NaN.
            BatchTooLarge: the batch doesn't fit into memory.
        """
        generator = torch.Generator().manual_seed(batch_seed(self._seed, batch[0].start))
        moments = _Moments(self._inverter, self._strip)
        watch: dict[str, Any] = {"callback": moments} if self._strip else {}
        labels = torch.tensor([trajectory.label for trajectory in batch])
        teacher = self._inverter.teacher
        with explained_memory(len(batch)):
            targets = self._recipe.targets(labels, teacher.num_classes, generator)
            result = self._inverter.invert(
                targets.to(teacher.device), generator=generator, progress=self._progress, **watch
            )
        return result, moments.seen

    def made(
        self, batch: Sequence[Trajectory], result: InversionResult, moments: Sequence[Tensor]
    ) -> MadeBatch:
        """What the pool takes of the result of a batch."""
        counts = torch.tensor([trajectory.images for trajectory in batch])
        rows = torch.arange(len(batch)).repeat_interleave(counts)
        most = images_of_a_trajectory(self._inverter.schedule)
        if most == 1:
            images, masks, ages = result.images, result.masks, result.ages.tolist()
            logits, confidence = result.logits, result.confidence
        else:
            found = result.sparse_images()
            chosen = torch.cat([most * i + torch.arange(t.images) for i, t in enumerate(batch)])
            chosen = chosen.to(result.images.device)
            images, masks = found.canvases[found.trajectory[chosen]], found.masks[chosen]
            ages = found.age[chosen].tolist()
            logits, confidence = found.logits[chosen], found.confidence[chosen]
        verdict = [{}] * len(rows) if self._judge is None else verdicts(self._judge, images)
        records = [
            {
                "label": batch[row].label,
                "prediction": prediction,
                "confidence": sure,
                "iterations": age,
                **({} if most == 1 else {"trajectory": batch[row].number}),
                **seen,
                **self._common,
            }
            for row, prediction, sure, age, seen in zip(
                rows.tolist(),
                logits.argmax(1).tolist(),
                confidence.tolist(),
                ages,
                verdict,
                strict=True,
            )
        ]
        return MadeBatch(
            images.cpu(),
            masks.cpu(),
            records,
            result.seconds,
            [moment[rows] for moment in moments],
            {"stops": list(self._inverter.schedule.at), "history": result.history},
        )


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
