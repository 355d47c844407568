"""Fill a pool: invert all wanted labels, batch by batch, from where the pool stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smi_fast.inversion import InversionResult, NonFiniteLoss, SparseInverter
from smi_fast.pool import LOSS_CURVES, UNFINISHED, Pool
from smi_fast.pool.pictures import loss_curves
from smi_fast.recipes import Recipe


class Interrupted(Exception):
    """Ctrl-C ended a batch; the message says what was done and where its images are."""


def fill(
    pool: Pool,
    inverter: SparseInverter,
    labels: Sequence[int],
    *,
    recipe: Recipe,
    batch_size: int = 40,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Inverts the labels that the pool doesn't hold yet.

    The images of a batch are decided by the seed and the index of its first image, so a resumed
    pool is the one that an uninterrupted run would have made.

    Args:
        pool: to be filled; image ``i`` is of label ``labels[i]``.
        inverter: inverts each batch.
        labels: class of each image of the whole pool.
        recipe: makes the targets of labels.
        batch_size: images inverted together.
        seed: from 0; decides noise and jitter.
        class_names: of the teacher's classes; by default their numbers.
        provenance: goes into the record of each image.
        progress: show the progress of each batch.

    Raises:
        Interrupted: by Ctrl-C. The images of the batch as they were are in ``unfinished/``.
        NonFiniteLoss: likewise, with the last finite images.
        PoolError: the pool can't be written.
    """
    for start in range(len(pool.records), len(labels), batch_size):
        wanted = list(labels[start : start + batch_size])
        generator = torch.Generator().manual_seed((seed << 32) + start)
        try:
            targets = recipe.targets(torch.tensor(wanted), inverter.teacher.num_classes, generator)
            targets = targets.to(inverter.teacher.device)
            result = inverter.invert(targets, generator=generator, progress=progress)
        except NonFiniteLoss as error:
            pool.add_unfinished(error.result.images)
            raise
        if result.interrupted:
            pool.add_unfinished(result.images)
            raise Interrupted(
                f"interrupted after {result.iterations} iterations: the images of this batch as "
                f"they were are in {pool.path / UNFINISHED}; --resume starts the batch again"
            )
        records = [
            {**record, **(provenance or {})} for record in _records(result, wanted, class_names)
        ]
        pool.add(result.images, result.masked_images, result.masks, records)
        loss_curves(result.history, inverter.schedule.at, pool.path / LOSS_CURVES)


def _records(
    result: InversionResult, wanted: Sequence[int], class_names: Sequence[str] | None
) -> list[dict[str, Any]]:
    predictions = result.logits.argmax(1).tolist()
    triples = zip(wanted, predictions, result.confidence.tolist(), strict=True)
    return [
        {
            "label": label,
            "class_name": str(label) if class_names is None else class_names[label],
            "prediction": prediction,
            "confidence": confidence,
            "iterations": result.iterations,
            "kept_patches": result.kept.shape[1],
        }
        for label, prediction, confidence in triples
    ]
