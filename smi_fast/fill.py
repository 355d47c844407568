"""Fill a pool: invert the labels that it doesn't hold yet, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smi_fast.inversion import InversionResult, NonFiniteLoss, SparseInverter
from smi_fast.pool import LOSS_CURVES, UNFINISHED, Pool
from smi_fast.pool.pictures import loss_curves
from smi_fast.recipes import Recipe


class Interrupted(Exception):
    """Ctrl-C ended a batch; the message says at which iteration, and where its images are."""


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
    """Invert the labels that the pool doesn't hold yet.

    The settings, the seed and the index of a batch's first image decide its images. So an
    interrupted and resumed run makes the same pool as one without interruption.

    Args:
        pool: the pool; image ``i`` has the label ``labels[i]``.
        inverter: inverts each batch.
        labels: class of each image of the whole pool.
        recipe: turns labels into targets.
        batch_size: number of images in a batch.
        seed: from 0; decides noise, jitter and soft targets.
        class_names: names of the teacher's classes by index; by default the index itself.
        provenance: further entries of each image's record.
        progress: show the progress of each batch.

    Raises:
        Interrupted: Ctrl-C ended a batch; its images so far are in the pool's ``unfinished/``.
        NonFiniteLoss: an objective or the gradient became infinite or NaN; the last finite images
            of the batch are in ``unfinished/``.
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
                f"interrupted after {result.iterations} iterations: the unfinished images of this "
                f"batch are in {pool.path / UNFINISHED}; --resume starts the batch again"
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
